"""What a file's KLD is worth at its size: against a curve of other files, read at the same number of bytes.

With the curve's points (bytes b, KLD k) in order of size and b₁ ≤ b ≤ b₂ the neighbours of a file of b bytes,

    log k(b) = log k₁ + (b − b₁)/(b₂ − b₁)·(log k₂ − log k₁)        ratio = KLD of the file / k(b)

Outside the curve its first or last two points are continued, and the result is marked where the file's size is not
within 0.5% of the curve's, which is equal enough elsewhere too (target.py). A point that a smaller file
equals or beats is left out: nobody would choose it, so it would flatter what it is compared with. Takes sizes and
KLDs, measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynrun.metrics.intervals import Clusters, drawn_means, middle_95

Rows = npt.NDArray[np.float64]
# Sizes that differ by less are called equal.
_EQUAL = 0.005


@dataclass(frozen=True)
class EqualSize:
    """``ratio``: the file's KLD over ``curve_kld``, the curve's at the file's size; under 1 the file is better.

    ``ci95`` of the ratio, None where only means are known; ``extrapolated``: the size lies outside the curve.
    """

    ratio: float
    curve_kld: float
    extrapolated: bool
    ci95: tuple[float, float] | None = None


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (bytes, KLD) that no other beats at the same size or a smaller one, by size.

    Points without divergence are left out too: they have no place on a logarithmic axis.
    """
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        kld = points[i][1]
        if kld > 0 and (not found or kld < points[found[-1]][1]):
            found.append(i)
    return found


def equal_size(size: float, kld: float, points: Sequence[tuple[float, float]]) -> EqualSize | None:
    """The equal-size ratio of a file of ``size`` bytes and mean KLD ``kld``; ``points`` are the curve's (bytes, KLD).

    None where the curve has fewer than two points, unless its one point has the file's size.
    """
    kept = [points[i] for i in frontier(points)]
    if not kept or (len(kept) == 1 and kept[0][0] != size):
        return None
    sizes = [point[0] for point in kept]
    logs = np.log([[point[1] for point in kept]])
    at = float(np.exp(_interpolated(sizes, logs, size)[0]))
    return EqualSize(kld / at, at, not sizes[0] * (1 - _EQUAL) <= size <= sizes[-1] * (1 + _EQUAL))


def equal_size_paired(size: float, file: Clusters, curve: Sequence[tuple[float, Clusters]]) -> EqualSize | None:
    """:func:`equal_size` with its interval: each draw takes the same clusters for the file and for the whole curve.

    Which points make the curve is decided once, by their means. Raises ValueError for different clusters.
    """
    if any(clusters.counts != file.counts for _, clusters in curve):
        raise ValueError("an equal-size ratio of different sequences")
    points = [(at, clusters.mean) for at, clusters in curve]
    found = equal_size(size, file.mean, points)
    if found is None:
        return None
    kept = [curve[i] for i in frontier(points)]
    drawn = np.stack([drawn_means(clusters) for _, clusters in kept], axis=1)
    # A resample of nothing but texts without divergence has no logarithm; it says nothing of the others either.
    usable = (drawn > 0).all(axis=1)
    if not usable.any():
        return found
    at = np.exp(_interpolated([at for at, _ in kept], np.log(drawn[usable]), size))
    return EqualSize(found.ratio, found.curve_kld, found.extrapolated, middle_95(drawn_means(file)[usable] / at))


def _interpolated(sizes: Sequence[float], logs: Rows, size: float) -> Rows:
    """Each row of ``logs`` [n, n_points] at ``size``, [n]; beyond the ends along the nearest segment."""
    if len(sizes) == 1:
        return logs[:, 0]
    i = min(max(int(np.searchsorted(sizes, size)) - 1, 0), len(sizes) - 2)
    share = (size - sizes[i]) / (sizes[i + 1] - sizes[i])
    at: Rows = logs[:, i] + share * (logs[:, i + 1] - logs[:, i])
    return at
