"""95% intervals of per-token means, clustered by sequence.

Tokens of one text diverge alike: taken as independent they give an interval that is too narrow. So whole sequences are
drawn with replacement and the ratio estimator Σ sums / Σ counts is taken of each draw (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, percentile interval). Takes sums per sequence, gives two numbers; measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float64]

N_RESAMPLES = 2000
_SEED = 20261124
# A single text is cut in this many consecutive blocks.
_BLOCKS = 10


@dataclass(frozen=True)
class Clusters:
    """For each cluster of tokens the ``sums`` of a quantity and the ``counts`` of its tokens."""

    sums: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean over all tokens."""
        return sum(self.sums) / sum(self.counts)


def clusters_of(groups: Sequence[Rows]) -> Clusters:
    """One cluster a group; a single group is cut into consecutive blocks, the best substitute within one text.

    Empty groups are left out. Raises ValueError where nothing is left.
    """
    kept = [group for group in groups if len(group)]
    if not kept:
        raise ValueError("no values to summarize")
    if len(kept) == 1:
        kept = np.array_split(kept[0], min(_BLOCKS, len(kept[0])))
    return Clusters(tuple(float(group.sum()) for group in kept), tuple(len(group) for group in kept))


def mean_interval(clusters: Clusters) -> tuple[float, float]:
    """95% interval of the mean over all tokens; of no width for a single cluster, as nothing is known of its spread."""
    return middle_95(drawn_means(clusters))


def drawn_means(clusters: Clusters) -> Rows:
    """The mean over all tokens in each resample, [N_RESAMPLES]: of the same clusters for the same number of them."""
    drawn = _draws(len(clusters.sums))
    means: Rows = (drawn @ np.array(clusters.sums)) / (drawn @ np.array(clusters.counts, dtype=np.float64))
    return means


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval."""

    value: float
    ci95: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """``value`` and ``ci95``, as every command prints them."""
        return {"value": self.value, "ci95": list(self.ci95)}


@dataclass(frozen=True)
class Ratio(Estimate):
    """A ratio of two means and its 95% interval."""


def mean_estimate(groups: Sequence[Rows]) -> Estimate:
    """Mean over all values in ``groups``, one group a sequence, with its interval."""
    clusters = clusters_of(groups)
    return Estimate(clusters.mean, mean_interval(clusters))


def paired_difference(one: Clusters, other: Clusters) -> Estimate:
    """Mean of ``one`` less mean of ``other``, both of the same clusters of tokens, which each draw takes for both.

    Raises ValueError for different clusters.
    """
    if one.counts != other.counts:
        raise ValueError("a paired difference of different sequences")
    return Estimate(one.mean - other.mean, middle_95(drawn_means(one) - drawn_means(other)))


def paired_ratio(numerator: Clusters, denominator: Clusters) -> Ratio | None:
    """Mean of ``numerator`` over mean of ``denominator``, both of the same clusters of tokens.

    Each draw takes the same clusters for both: what makes a text hard for one makes it hard for the other, and cancels.
    None where the denominator is zero. Raises ValueError for different clusters.
    """
    if numerator.counts != denominator.counts:
        raise ValueError("a paired ratio of different sequences")
    below = np.array(denominator.sums)
    drawn = _draws(len(below))
    totals = drawn @ below
    if not totals.min() > 0:
        return None
    value = sum(numerator.sums) / sum(denominator.sums)
    return Ratio(value, middle_95((drawn @ np.array(numerator.sums)) / totals))


@lru_cache(maxsize=8)
def _draws(n: int) -> Rows:
    """How often each of ``n`` clusters is taken in each resample, [N_RESAMPLES, n]; seeded: intervals repeat."""
    rng = np.random.default_rng(_SEED)
    return rng.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES).astype(np.float64)


def middle_95(values: Rows) -> tuple[float, float]:
    """What lies between the 2.5th and the 97.5th percentile of resampled values."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
