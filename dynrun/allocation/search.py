"""From prices to the best scheme that measuring can find: candidates, operating points, and the choice among them.

Takes the options of every tensor and what solves them within the limits; :class:`~dynrun.allocation.bench.Bench`
measures. The text of the probe split decides; the test split is never seen.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from dynrun.allocation import candidates as ways
from dynrun.allocation.bench import types_key
from dynrun.allocation.candidates import Candidate, Options, Solver
from dynrun.allocation.operating_point import Observation, groups_of, refit
from dynrun.errors import DoesNotFitError
from dynrun.metrics.intervals import Clusters, Ratio, paired_ratio
from dynrun.sensitivity.slopes import Slope

# Perturbations that are drawn before it is given up to find as many different schemes as were asked for.
_MOST_PERTURBED = 50
# A fit that strays far gains more where it is right and loses more where it is not.
_STRAYS = (0.15, 0.3)


@dataclass(frozen=True)
class SearchSettings:
    """``n_tokens`` of the probe split to measure whole schemes on, in sequences of ``n_ctx``; at least ``n_candidates``
    schemes, then at most ``rounds`` of refitting the prices to them. 0 candidates: the additive model's scheme,
    unmeasured."""

    n_tokens: int = 4096
    n_ctx: int = 256
    n_candidates: int = 10
    rounds: int = 3


@dataclass(frozen=True)
class Trial:
    """A candidate and its mean KLD (nats per token) on each selection sequence: measured with its weights in place,
    and what the kernels' quantization of activations is predicted to add."""

    candidate: Candidate
    clusters: Clusters

    @property
    def kld(self) -> float:
        return self.clusters.mean

    def to_json(self) -> dict[str, Any]:
        candidate = self.candidate
        return {"name": candidate.name, "predicted_kld": candidate.predicted, "kld": self.kld}


@dataclass(frozen=True)
class Found:
    """All trials, the best first; ``ratio``: its KLD over the runner-up's, paired; ``factors``: what the prices of
    groups of tensors were multiplied by in the last refit."""

    trials: tuple[Trial, ...]
    ratio: Ratio | None
    factors: Mapping[str, float] = field(default_factory=dict)

    @property
    def best(self) -> Trial:
        return self.trials[0]


class Measures(Protocol):
    """What measures whole schemes: the mean KLD of each selection sequence, of so many scored tokens."""

    @property
    def weights(self) -> list[int]: ...
    def scheme(self, types: Mapping[str, str]) -> list[float]: ...


class Narrator(Protocol):
    """What is told of the search: ``done`` of ``total`` measurements, and what was measured."""

    def __call__(self, done: float, total: float, note: str = "") -> None: ...


@dataclass
class Search:
    """One search: ``options`` with their additive prices, ``solve`` within the limits; ``unseen``: for each tensor the
    part of a type's price that weights put in place do not show."""

    options: Options
    solve: Solver
    slopes: Mapping[str, Slope]
    errors: Mapping[str, Mapping[str, float]]
    unseen: Mapping[str, Callable[[str], float]]
    bench: Measures
    settings: SearchSettings
    narrate: Narrator
    _trials: dict[str, Trial] = field(default_factory=dict)

    def run(self) -> Found:
        """Measure and choose."""
        models = {"additive": self.options, **dict(ways.models(self.options, self.slopes, self.errors))}
        base, least = self.options, math.inf
        for name, options in models.items():
            kld = self._try(name, options)
            if kld < least:
                base, least = options, kld
        spreads = {name: slope.spread for name, slope in self.slopes.items()}
        for seed in range(_MOST_PERTURBED):
            if len(self._trials) >= self.settings.n_candidates:
                break
            self._try(f"perturbed {seed + 1}", ways.perturbed(base, spreads, seed))
        factors = self._refits(base)
        ranked = sorted(self._trials.values(), key=lambda trial: (trial.kld, trial.candidate.name))
        ratio = paired_ratio(ranked[0].clusters, ranked[1].clusters) if len(ranked) > 1 else None
        return Found(tuple(ranked), ratio, factors)

    def _refits(self, base: Options) -> dict[str, float]:
        """Refit the prices of the best model to all that was measured and solve again, until the measured KLD stops
        falling."""
        factors: dict[str, float] = {}
        for number in range(1, self.settings.rounds + 1):
            best, n_known = min(trial.kld for trial in self._trials.values()), len(self._trials)
            observed = [one for trial in self._trials.values() if (one := self._observed(trial, base))]
            for stray in _STRAYS:
                factors = refit(observed, stray)
                self._try(f"refit {number}, τ {stray:g}", ways.by_groups(base, factors))
            if len(self._trials) == n_known or min(trial.kld for trial in self._trials.values()) >= best:
                break
        return factors

    def _try(self, name: str, options: Options) -> float:
        """Solve and measure, unless another way came to the same types, or has none for these options; the KLD."""
        try:
            types = self.solve(options).types
        except DoesNotFitError:
            return math.inf  # a restricted menu may have nothing small enough
        if (key := types_key(types)) in self._trials:
            return self._trials[key].kld
        klds, weights = self.bench.scheme(types), self.bench.weights
        unseen = math.fsum(self.unseen[tensor](t) for tensor, t in types.items())
        clusters = Clusters(tuple((k + unseen) * w for k, w in zip(klds, weights, strict=True)), tuple(weights))
        trial = self._trials[key] = Trial(ways.candidate(name, self.options, types), clusters)
        note = f"{name}: KLD {trial.kld:.5f}, predicted {trial.candidate.predicted:.5f}"
        self.narrate(len(self._trials), max(self.settings.n_candidates, len(self._trials)), note)
        return trial.kld

    def _observed(self, trial: Trial, base: Options) -> Observation | None:
        """What a trial says at the prices of ``base``; None where that has not all of its types."""
        costs: defaultdict[str, float] = defaultdict(float)
        groups = groups_of(base)
        for name, type_name in trial.candidate.types.items():
            own = next((o.cost for o in base[name] if o.type == type_name), None)
            if own is None:
                return None
            costs[groups[name]] += own
        return Observation(costs, trial.kld)
