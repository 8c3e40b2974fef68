"""95% intervals of per-token means, clustered by sequence.

Tokens of one text diverge alike: taken as independent they give an interval that is too narrow. So whole sequences are
drawn with replacement and the ratio estimator Σ sums / Σ counts is taken of each draw (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, percentile interval). Takes sums per sequence, gives two numbers; measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    drawn = _draws(len(clusters.sums))
    return _middle_95((drawn @ np.array(clusters.sums)) / (drawn @ np.array(clusters.counts, dtype=np.float64)))


@dataclass(frozen=True)
class Ratio:
    """A ratio of two means and its 95% interval."""

    value: float
    ci95: tuple[float, float]


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
    return Ratio(value, _middle_95((drawn @ np.array(numerator.sums)) / totals))


def _draws(n: int) -> Rows:
    """How often each of ``n`` clusters is taken in each resample, [N_RESAMPLES, n]; seeded: intervals repeat."""
    rng = np.random.default_rng(_SEED)
    return rng.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES).astype(np.float64)


def _middle_95(values: Rows) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
