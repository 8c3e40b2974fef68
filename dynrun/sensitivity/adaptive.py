"""Spend tokens where they could change the solution.

All units are probed on a few sequences. Then, for prices of a byte over the whole range of sizes, the type that each
tensor would get is found with its slope as measured, and one standard error above and below: what those choices cost
more, were the measured slope right, is what not knowing it better may cost (the expected value of the information,
to second order). Units are measured on twice as many sequences, the costliest first, until the sum over all tensors is
under the wanted share of the predicted KLD at every price, or the sequences are used up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynrun.sensitivity.estimate import FIRST, estimate, n_sequences_of
from dynrun.sensitivity.probe_log import ProbeLog
from dynrun.sensitivity.slopes import Slope
from dynrun.sensitivity.sweep import Job, Probe, Probes
from dynrun.sensitivity.units import Unit

Floats = npt.NDArray[np.float64]
_PRICES = 33


@dataclass(frozen=True)
class Progress:
    """What a probe's line in the log says; ``total`` is what is known to be needed so far."""

    done: int
    total: int
    probe: Probe


@dataclass(frozen=True)
class Choices:
    """The types a tensor may have: ``errors`` and ``nbytes``, [n_types] each."""

    errors: Floats
    nbytes: Floats


@dataclass(frozen=True)
class Spent:
    """``slopes`` of every tensor; ``doubt``: the expected loss that is left, as a share of the predicted KLD;
    ``n_tokens`` over all probes."""

    slopes: dict[str, Slope]
    doubt: float
    n_tokens: int


def spend(
    units: Sequence[Unit],
    choices: Mapping[str, Choices],
    log: ProbeLog,
    probes: Probes,
    *,
    n_sequences: int,
    wanted: float,
    progress: Callable[[Progress], None],
) -> Spent:
    """Measure ``units`` until the doubt is at most ``wanted`` or all have ``n_sequences`` sequences."""
    runner = _Runner(log, probes, progress)
    counts = {unit.name: min(FIRST, n_sequences) for unit in units}
    while True:
        runner.measure([(unit, counts[unit.name]) for unit in units])
        slopes = estimate(units, log, counts)
        losses = expected_losses(slopes, choices)
        doubt = float(losses.sum(axis=0).max())
        names = list(slopes)
        by_unit = {u.name: losses[[names.index(t) for t in u.types[0]]].sum(axis=0) for u in units}
        open_units = [u for u in units if counts[u.name] < n_sequences]
        if doubt <= wanted or not open_units:
            n_tokens = sum(sum(log.weights[i] for i in klds) for klds in log.klds.values())
            return Spent(slopes, doubt, n_tokens)
        for unit in _worth_more(open_units, by_unit, wanted):
            counts[unit.name] = min(n_sequences, 2 * counts[unit.name])


def expected_losses(slopes: Mapping[str, Slope], choices: Mapping[str, Choices]) -> Floats:
    """[n_tensors, n_prices]: what each tensor's uncertainty is expected to cost, over the whole predicted KLD."""
    prices = {name: np.array([slopes[name].price(e) for e in choices[name].errors]) for name in slopes}
    densities = _byte_prices(prices, choices)
    losses, totals = np.zeros((len(slopes), len(densities))), np.zeros(len(densities))
    for row, (name, slope) in enumerate(slopes.items()):
        costs, nbytes = prices[name], choices[name].nbytes[None, :] * densities[:, None]
        best = costs + nbytes
        chosen = best.argmin(axis=1)
        totals += costs[chosen]
        for factor in (math.exp(slope.spread), math.exp(-slope.spread)):
            other = (costs * factor + nbytes).argmin(axis=1)
            places = np.arange(len(densities))
            losses[row] += (best[places, other] - best[places, chosen]) / 2
    shares: Floats = losses / np.maximum(totals, 1e-30)
    return shares


def _byte_prices(prices: Mapping[str, Floats], choices: Mapping[str, Choices]) -> Floats:
    """Prices of a byte at which tensors change their type, from the 2nd to the 98th percentile, evenly in the log."""
    rates = []
    for name, costs in prices.items():
        order = np.argsort(choices[name].nbytes, kind="stable")
        gained, paid = -np.diff(costs[order]), np.diff(choices[name].nbytes[order])
        useful = (gained > 0) & (paid > 0)
        rates += (gained[useful] / paid[useful]).tolist()
    if not rates:
        return np.array([1.0])
    low, high = np.log(np.quantile(rates, (0.02, 0.98)))
    return np.exp(np.linspace(low, high, _PRICES))


def _worth_more(units: Sequence[Unit], losses: Mapping[str, Floats], wanted: float) -> list[Unit]:
    """The units without which the others' losses would sum to half of what is wanted, at every price."""
    ranked = sorted(units, key=lambda unit: -float(losses[unit.name].max()))
    rest = np.sum([losses[unit.name] for unit in units], axis=0)
    for n, unit in enumerate(ranked, start=1):
        rest = rest - losses[unit.name]
        if float(rest.max()) <= wanted / 2:
            return ranked[:n]
    return ranked


@dataclass
class _Runner:
    log: ProbeLog
    probes: Probes
    progress: Callable[[Progress], None]
    done: int = 0

    def measure(self, wanted: Iterable[tuple[Unit, int]]) -> None:
        """Have the log hold so many sequences of each unit: all of the coarse type, half of the finer ones."""
        jobs: list[Job] = []
        for unit, n in wanted:
            for level, types in enumerate(unit.types):
                job = self.log.lacking(unit.name, types, n_sequences_of(level, n))
                jobs += [job] if job else []
        total = self.done + len(jobs)
        for probe in self.probes.run(jobs):
            self.log.add(probe)
            self.done += 1
            self.progress(Progress(self.done, total, probe))
