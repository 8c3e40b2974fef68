"""The price of a type, from measured points."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynrun.sensitivity.slopes import Slope

positive = st.floats(min_value=1e-8, max_value=1.0)


def test_a_measured_error_is_priced_at_its_measured_kld() -> None:
    slope = Slope(((0.001, 0.0003), (0.02, 0.004), (0.1, 0.05)))
    for error, kld in slope.points:
        assert slope.price(error) == pytest.approx(kld)


def test_the_slope_is_clamped_outside_the_points() -> None:
    slope = Slope(((0.001, 0.0003), (0.02, 0.004)))
    assert slope.at(0.2) == slope.at(0.02) == pytest.approx(0.2)
    assert slope.at(1e-6) == slope.at(0.001) == pytest.approx(0.3)


def test_between_the_points_it_is_interpolated_in_the_logarithms() -> None:
    slope = Slope(((0.01, 0.01), (0.04, 0.04 * 4), (0.16, 0.16)))
    assert slope.at(0.02) == pytest.approx(2.0)
    assert slope.at(0.08) == pytest.approx(2.0)


@given(positive, positive, positive, positive, positive, positive)
def test_a_larger_error_never_costs_less_where_the_points_agree(
    e1: float, e2: float, k1: float, k2: float, a: float, b: float
) -> None:
    (low_e, high_e), (low_k, high_k) = sorted((e1, e2)), sorted((k1, k2))
    slope = Slope(((low_e, low_k), (high_e, high_k)))
    low, high = sorted((a, b))
    assert slope.price(low) <= slope.price(high) * (1 + 1e-9)


def test_nothing_measured_costs_nothing() -> None:
    assert Slope(((0.0, 0.0), (0.0, 0.0))).price(0.1) == 0.0


def test_noise_below_zero_is_no_gain() -> None:
    assert Slope(((0.001, 1e-6), (0.02, -1e-9))).price(0.02) >= 0.0


@given(positive, positive, positive, st.floats(min_value=0.01, max_value=100.0))
def test_a_scaled_slope_prices_everything_by_the_factor(e: float, k: float, error: float, factor: float) -> None:
    slope = Slope(((e, k), (e * 2, k * 3)), spread=0.1)
    assert slope.scaled(factor).price(error) == pytest.approx(slope.price(error) * factor, rel=1e-6)
    assert slope.scaled(factor).spread == slope.spread
