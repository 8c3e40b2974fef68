"""Slopes from the probes of sequences, of which some units have more than others.

A sequence is hard or easy for all tensors: D_s, its KLD over that of the sequences that every unit has, summed over the
units that have it, corrects those that lack it. The rest of the spread between sequences is the unit's own; with few
sequences it is drawn to what the other units have (an empirical Bayes estimate of the variance, as limma's for few
replicates: Smyth, 2004, doi:10.2202/1544-6115.1027, equation for s̃²).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dynrun.sensitivity.probe_log import ProbeLog, key_of
from dynrun.sensitivity.slopes import Slope
from dynrun.sensitivity.units import Unit

# Sequences that the pooled variance counts as.
_PRIOR_SEQUENCES = 4
# Sequences that every unit gets.
FIRST = 2


def n_sequences_of(level: int, n: int) -> int:
    """How many sequences of a type, 0 the coarse one, belong to ``n`` of the coarse one."""
    return n if level == 0 else min(n, max(FIRST, n // 2))


def estimate(units: Sequence[Unit], log: ProbeLog, counts: Mapping[str, int]) -> dict[str, Slope]:
    """The slope of every tensor in ``units``, from the first ``counts`` sequences of each, whatever else is known: so
    that a run that was interrupted decides as if it had not been."""
    coarse = {unit.name: _first(log, unit, 0, counts) for unit in units}
    hardness = _hardness(list(coarse.values()), log.weights)
    levels = {name: _level(klds, hardness, log.weights) for name, klds in coarse.items()}
    spreads = _spreads(coarse, hardness)
    slopes: dict[str, Slope] = {}
    for unit in units:
        slopes |= _slopes(unit, log, counts, levels[unit.name], spreads[unit.name])
    return slopes


def _first(log: ProbeLog, unit: Unit, level: int, counts: Mapping[str, int]) -> dict[int, float]:
    known = log.klds.get(key_of(unit.name, unit.types[level]), {})
    return {i: kld for i, kld in known.items() if i < n_sequences_of(level, counts[unit.name])}


def _hardness(measured: Sequence[Mapping[int, float]], weights: Mapping[int, int]) -> dict[int, float]:
    """D_s of every sequence that any unit has."""
    shared = set.intersection(*(set(klds) for klds in measured))
    base = sum(weights[i] for i in shared)
    means = [sum(klds[i] * weights[i] for i in shared) / base for klds in measured]
    found = {}
    for i in sorted(set().union(*measured)):
        have = [(klds[i], mean) for klds, mean in zip(measured, means, strict=True) if i in klds]
        below = sum(mean for _, mean in have)
        found[i] = sum(kld for kld, _ in have) / below if below > 0 else 1.0
    return found


def _level(klds: Mapping[int, float], hardness: Mapping[int, float], weights: Mapping[int, int]) -> float:
    """The mean KLD over all sequences, as far as the measured ones tell."""
    n = sum(weights[i] for i in klds)
    mean = sum(kld * weights[i] for i, kld in klds.items()) / n
    own = sum(hardness[i] * weights[i] for i in klds) / n
    whole = sum(d * weights[i] for i, d in hardness.items()) / sum(weights[i] for i in hardness)
    return mean * whole / own if own > 0 else mean


def _spreads(coarse: Mapping[str, Mapping[int, float]], hardness: Mapping[int, float]) -> dict[str, float]:
    """Relative standard error of every unit's level."""
    variances, counts = {}, {}
    for name, klds in coarse.items():
        relative = np.array([kld / hardness[i] if hardness[i] > 0 else 0.0 for i, kld in klds.items()])
        mean = float(relative.mean())
        counts[name] = len(relative)
        variances[name] = float(relative.var(ddof=1)) / mean**2 if len(relative) > 1 and mean > 0 else float("nan")
    known = [v for v in variances.values() if np.isfinite(v)]
    # The median: a few units whose divergence sits in single tokens would raise the mean for all.
    pooled = float(np.median(known)) if known else 1.0
    spreads = {}
    for name, n in counts.items():
        own = variances[name] if np.isfinite(variances[name]) else pooled
        variance = ((n - 1) * own + _PRIOR_SEQUENCES * pooled) / (n - 1 + _PRIOR_SEQUENCES)
        spreads[name] = float(np.sqrt(variance / n))
    return spreads


def _slopes(unit: Unit, log: ProbeLog, counts: Mapping[str, int], whole: float, spread: float) -> dict[str, Slope]:
    """Of each tensor of the unit. Finer types are put on all sequences by their ratio to the coarse one on the shared
    sequences: both are moved alike by which tokens are in the sample, so their ratio needs fewer of them."""
    coarse = _first(log, unit, 0, counts)
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in unit.types[0]}
    for level, types in enumerate(unit.types):
        own = _first(log, unit, level, counts)
        below = sum(coarse[i] * log.weights[i] for i in own)
        above = sum(kld * log.weights[i] for i, kld in own.items())
        kld = whole * above / below if below > 0 else 0.0
        errors = log.errors[key_of(unit.name, types)]
        total = sum(errors.values())
        for name, error in errors.items():
            points[name].append((error, kld * (error / total if total > 0 else 1 / len(errors))))
    return {name: Slope(tuple(sorted(found)), spread) for name, found in points.items()}
