"""Speeds with noise: intervals, comparisons and drift against simulations and the textbook."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from dynrun.metrics.rates import Change, Rate, compared, drift, rate


def test_the_interval_is_students() -> None:
    # t(0.975, 4) = 2.776; standard error 1/√2 … of 98, 99, 100, 101, 102.
    found = rate([98, 99, 100, 101, 102])
    half = 2.7764 * math.sqrt(2.5) / math.sqrt(5)
    assert found.ci95 == pytest.approx((100 - half, 100 + half), rel=1e-4)
    assert found.half_width == pytest.approx(half / 100, rel=1e-4)


@given(st.lists(st.floats(1, 1000), min_size=2, max_size=6), st.lists(st.floats(1, 1000), min_size=2, max_size=6))
def test_the_comparison_is_welchs_as_scipy_has_it(before: list[float], after: list[float]) -> None:
    old, new = np.log(before), np.log(after)
    assume(min(old.std(), new.std()) > 1e-3)
    interval = stats.ttest_ind(new, old, equal_var=False).confidence_interval(0.95)
    found = compared(before, after)
    assert np.log(found.ci95) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-9)
    assert found.ratio == pytest.approx(math.exp(new.mean() - old.mean()))


def test_one_round_proves_nothing() -> None:
    assert rate([100.0]) == Rate(100.0, 0.0, (-math.inf, math.inf))
    assert rate([100.0]).half_width == math.inf
    assert rate([0.0, 0.0]).half_width == math.inf
    assert compared([100.0], [200.0]) == Change(pytest.approx(2.0), (0.0, math.inf), "no difference beyond noise")
    assert compared([100.0], [200.0, 201.0]).verdict == "no difference beyond noise"
    with pytest.raises(ValueError, match="no rounds"):
        rate([])


def test_of_equal_speeds_at_most_about_one_in_twenty_is_called_different() -> None:
    random = np.random.default_rng(1)
    wrong = sum(
        compared(random.normal(100, 3, 5).tolist(), random.normal(100, 6, 7).tolist()).verdict
        != "no difference beyond noise"
        for _ in range(1000)
    )
    assert wrong <= 75


def test_a_change_far_above_the_noise_is_found_with_its_direction() -> None:
    random = np.random.default_rng(2)
    slow, fast = random.normal(100, 1, 5).tolist(), random.normal(110, 1, 5).tolist()
    change = compared(slow, fast)
    assert change.verdict == "faster"
    assert change.ci95[0] < 1.1 < change.ci95[1]
    assert compared(fast, slow).verdict == "slower"


@given(st.lists(st.floats(1, 1000), min_size=2, max_size=6), st.lists(st.floats(1, 1000), min_size=2, max_size=6))
def test_comparing_the_other_way_round_gives_the_inverse(a: list[float], b: list[float]) -> None:
    there, back = compared(a, b), compared(b, a)
    assert there.ratio * back.ratio == pytest.approx(1)
    assert there.ci95[0] * back.ci95[1] == pytest.approx(1)


def test_equal_rounds_have_no_noise() -> None:
    assert compared([100.0, 100.0], [101.0, 101.0]).verdict == "faster"
    assert rate([5.0, 5.0, 5.0]).half_width == 0


def test_a_machine_that_slows_down_is_seen_and_a_noisy_one_is_not() -> None:
    times, random = list(range(10)), np.random.default_rng(3)
    throttled = drift(times, [100 * 0.98**t for t in times])
    assert throttled is not None
    assert throttled.proven
    assert throttled.change == pytest.approx(0.98**9 - 1)
    proven = 0
    for _ in range(300):
        found = drift(times, random.normal(100, 5, 10).tolist())
        assert found is not None
        proven += found.proven
    assert proven <= 25


def test_a_drift_has_the_interval_of_a_straight_line_through_logarithms() -> None:
    times, speeds = [10.0, 11.0, 14.0, 20.0, 23.0], [100.0, 97.0, 98.0, 91.0, 92.0]
    found, fit = drift(times, speeds), stats.linregress(times, np.log(speeds))
    half = stats.t.ppf(0.975, 3) * fit.stderr
    assert found is not None
    assert found.change == pytest.approx(math.expm1(13 * fit.slope))
    assert found.ci95 == pytest.approx((math.expm1(13 * (fit.slope - half)), math.expm1(13 * (fit.slope + half))))
    assert drift(times[:4], speeds[:4]) is not None
    assert drift([5.0] * 5, speeds) is None, "no time went by"


def test_three_runs_are_too_few_for_a_drift() -> None:
    assert drift([0, 1, 2], [100, 90, 80]) is None


def test_a_drift_and_its_interval_are_those_of_the_regression() -> None:
    times, speeds = [0.0, 1.0, 2.5, 4.0, 7.0], [100.0, 99.0, 101.0, 96.0, 95.0]
    fit = stats.linregress(times, np.log(speeds))
    half = stats.t.ppf(0.975, 3) * fit.stderr
    found = drift(times, speeds)
    assert found is not None
    assert found.change == pytest.approx(math.expm1(7 * fit.slope))
    assert found.ci95 == pytest.approx((math.expm1(7 * (fit.slope - half)), math.expm1(7 * (fit.slope + half))))


def test_two_rounds_have_an_interval_and_a_deviation() -> None:
    found = rate([99.0, 101.0])
    assert found.stddev == pytest.approx(math.sqrt(2))
    # t(0.975, 1) = 12.706.
    assert found.ci95 == pytest.approx((100 - 12.706, 100 + 12.706), rel=1e-4)


def test_runs_at_two_moments_have_a_drift() -> None:
    found = drift([0.0, 0.0, 10.0, 10.0], [100.0, 101.0, 90.0, 91.0])
    assert found is not None
    assert found.change == pytest.approx(-0.0995, abs=1e-3)


def test_rounds_that_are_all_alike_are_no_faster_than_themselves() -> None:
    assert compared([100.0, 100.0], [100.0, 100.0]) == Change(1.0, (1.0, 1.0), "no difference beyond noise")
