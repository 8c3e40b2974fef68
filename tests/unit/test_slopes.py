"""The price of a type, from two measured points."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynrun.sensitivity.slopes import Slope

positive = st.floats(min_value=1e-8, max_value=1.0)


def test_a_measured_error_is_priced_at_its_measured_kld() -> None:
    slope = Slope(coarse=(0.02, 0.004), fine=(0.001, 0.0003))
    assert slope.price(0.02) == pytest.approx(0.004)
    assert slope.price(0.001) == pytest.approx(0.0003)


def test_the_slope_is_clamped_outside_the_two_points() -> None:
    slope = Slope(coarse=(0.02, 0.004), fine=(0.001, 0.0003))
    assert slope.at(0.2) == slope.at(0.02) == pytest.approx(0.2)
    assert slope.at(1e-6) == slope.at(0.001) == pytest.approx(0.3)


def test_between_the_points_it_is_interpolated_in_the_logarithms() -> None:
    slope = Slope(coarse=(0.04, 0.04 * 4), fine=(0.01, 0.01))
    assert slope.at(0.02) == pytest.approx(2.0)


@given(positive, positive, positive, positive, positive, positive)
def test_a_larger_error_never_costs_less_where_the_points_agree(
    e1: float, e2: float, k1: float, k2: float, a: float, b: float
) -> None:
    (low_e, high_e), (low_k, high_k) = sorted((e1, e2)), sorted((k1, k2))
    slope = Slope(coarse=(high_e, high_k), fine=(low_e, low_k))
    low, high = sorted((a, b))
    assert slope.price(low) <= slope.price(high) * (1 + 1e-9)


def test_nothing_measured_costs_nothing() -> None:
    assert Slope(coarse=(0.0, 0.0), fine=(0.0, 0.0)).price(0.1) == 0.0


def test_noise_below_zero_is_no_gain() -> None:
    assert Slope(coarse=(0.02, -1e-9), fine=(0.001, 1e-6)).price(0.02) >= 0.0
