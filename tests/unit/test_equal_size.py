"""Ratios at equal size, on the one published table that has all its numbers."""

from __future__ import annotations

import numpy as np
import pytest

from dynrun.metrics.equal_size import EqualSize, equal_size, equal_size_paired, frontier
from dynrun.metrics.intervals import Clusters, clusters_of

# Unsloth's table of Gemma 3 27B: GB and mean KLD of the files of its former method; of the new one below.
BASELINE = [
    (5.83, 1.035688),
    (6.33, 0.832252),
    (7.16, 0.535764),
    (8.84, 0.26554),
    (9.78, 0.229671),
    (12.51, 0.087845),
    (15.41, 0.024916),
]


@pytest.mark.parametrize(
    ("size", "kld", "ratio", "extrapolated"),
    [(6.06, 0.972932, 1.039, False), (9.95, 0.220937, 1.021, False), (15.64, 0.023701, 1.051, True)],
)
def test_unsloths_own_table_shows_no_gain_at_equal_size(
    size: float, kld: float, ratio: float, extrapolated: bool
) -> None:
    found = equal_size(size, kld, BASELINE)
    assert found is not None
    assert found.ratio == pytest.approx(ratio, abs=5e-4)
    assert found.extrapolated is extrapolated


def test_a_point_of_the_curve_has_a_ratio_of_one() -> None:
    for size, kld in BASELINE:
        found = equal_size(size, kld, BASELINE[::-1])
        assert found is not None
        assert found.ratio == pytest.approx(1)
        assert not found.extrapolated


def test_a_few_bytes_outside_the_curve_are_no_extrapolation() -> None:
    curve = [(1000.0, 0.5), (2000.0, 0.1)]
    for size, outside in ((996.0, False), (994.0, True), (2009.0, False), (2011.0, True)):
        found = equal_size(size, 0.2, curve)
        assert found is not None
        assert found.extrapolated is outside, size


def test_a_file_below_the_curve_is_extrapolated_too() -> None:
    found = equal_size(5.0, 1.0, BASELINE)
    assert found is not None
    assert found.extrapolated
    assert found.curve_kld > BASELINE[0][1]


def test_a_point_that_a_smaller_one_beats_is_no_opponent() -> None:
    points = [*BASELINE, (9.0, 0.9), (8.84, 0.3), (20.0, 0.0)]
    assert [points[i] for i in frontier(points)] == BASELINE
    assert equal_size(9.0, 0.2, points) == equal_size(9.0, 0.2, BASELINE)


@pytest.mark.parametrize("points", [[], [(6.0, 0.5)], [(6.0, 0.5), (7.0, 0.6)], [(6.0, 0.0), (7.0, 0.0)]])
def test_less_than_two_points_make_no_curve(points: list[tuple[float, float]]) -> None:
    assert equal_size(6.5, 0.5, points) is None


def test_one_point_of_the_very_same_size_is_enough() -> None:
    found = equal_size(6.0, 0.25, [(6.0, 0.5)])
    assert found is not None
    assert (found.ratio, found.extrapolated) == (0.5, False)


def _clusters(level: float, noise_seed: int) -> Clusters:
    """Texts of very different difficulty, the same for every file, and a little noise of the file's own."""
    rng = np.random.default_rng(7)
    hardness = rng.lognormal(0, 0.8, 40)
    noise = np.random.default_rng(noise_seed)
    return clusters_of([np.full(50, level * h * (1 + 0.02 * noise.standard_normal())) for h in hardness])


def test_the_interval_is_paired_so_that_hard_texts_cancel() -> None:
    curve = [(100.0, _clusters(0.4, 1)), (120.0, _clusters(0.2, 2)), (140.0, _clusters(0.1, 3))]
    found = equal_size_paired(110.0, _clusters(0.8 * np.sqrt(0.4 * 0.2), 4), curve)
    assert found is not None
    assert found.ci95 is not None
    assert found.ratio == pytest.approx(0.8, rel=0.03)
    assert found.ci95[0] < found.ratio < found.ci95[1]
    assert found.ci95[1] - found.ci95[0] < 0.05


def test_other_sequences_than_the_curves_are_refused() -> None:
    with pytest.raises(ValueError, match="different sequences"):
        equal_size_paired(1.0, Clusters((1.0,), (5,)), [(1.0, Clusters((1.0,), (6,)))])


def test_its_interval_leaves_the_rest_as_it_is() -> None:
    curve = [(1000.0, Clusters((5.0, 7.0), (10, 10))), (2000.0, Clusters((1.0, 2.0), (10, 10)))]
    for size in (1500.0, 900.0):
        file = Clusters((2.0, 3.0), (10, 10))
        plain = equal_size(size, file.mean, [(at, clusters.mean) for at, clusters in curve])
        paired = equal_size_paired(size, file, curve)
        assert plain is not None
        assert paired is not None
        assert paired == EqualSize(plain.ratio, plain.curve_kld, plain.extrapolated, paired.ci95)
        assert paired.ci95 is not None
        assert paired.extrapolated is (size < 1000)


def test_of_two_sizes_with_one_divergence_the_smaller_makes_the_curve() -> None:
    assert frontier([(1000.0, 0.5), (2000.0, 0.5), (3000.0, 0.1)]) == [0, 2]


def test_the_last_size_within_half_a_percent_is_inside() -> None:
    curve = [(1000.0, 0.5), (2000.0, 0.1)]
    for size in (1000.0 * (1 - 0.005), 2000.0 * (1 + 0.005)):
        found = equal_size(size, 0.2, curve)
        assert found is not None
        assert not found.extrapolated


def test_a_draw_without_divergence_says_nothing() -> None:
    curve = [(1000.0, Clusters((0.0, 7.0), (10, 10))), (2000.0, Clusters((0.0, 2.0), (10, 10)))]
    found = equal_size_paired(1500.0, Clusters((0.0, 3.0), (10, 10)), curve)
    assert found is not None
    assert found.ci95 is not None
    assert np.isfinite(found.ci95).all()
