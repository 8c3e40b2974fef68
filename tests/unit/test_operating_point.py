"""Factors of groups of tensors, from schemes that were measured whole."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrun.allocation.operating_point import Observation, groups_of, refit

TRUE = {"a first": 0.7, "a second": 1.4, "b first": 0.9, "b second": 1.2, "output.weight": 0.8}
# What the module's docstring lets a group stray at most.
LEAST, MOST = 0.4, 2.5
STRAY = 0.3


def schemes(factors: Mapping[str, float], n: int, *, noise: float = 0.0, seed: int = 0) -> list[Observation]:
    """Schemes of equal additive price, spread over the groups in other ways, and KLDs by the true ``factors``: all of
    them are near enough to the best one."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        shares = np.exp(0.4 * rng.standard_normal(len(factors)))
        costs = {group: float(0.1 * share / shares.sum()) for group, share in zip(factors, shares, strict=True)}
        kld = sum(cost * factors[group] for group, cost in costs.items())
        found.append(Observation(costs, kld * float(np.exp(noise * rng.standard_normal()))))
    return found


def relative(factors: Mapping[str, float]) -> dict[str, float]:
    """Over their mean: a factor common to all groups moves no choice, and is left out of them."""
    mean = sum(factors.values()) / len(factors)
    return {group: factor / mean for group, factor in factors.items()}


def test_a_group_is_a_kind_in_one_half_of_the_layers() -> None:
    names = [f"blk.{i}.{kind}.weight" for i in range(5) for kind in ("attn_q", "ffn_up")] + ["output.weight"]
    groups = groups_of(names)
    assert list(groups) == names
    assert [groups[f"blk.{i}.attn_q.weight"].split()[1] for i in range(5)] == ["first"] * 3 + ["second"] * 2
    assert groups["output.weight"] == "output.weight"
    assert len(set(groups.values())) == 5


def test_tensors_of_a_model_without_blocks_are_groups_of_their_own() -> None:
    assert groups_of(["a", "b"]) == {"a": "a", "b": "b"}
    assert groups_of([]) == {}


def test_without_noise_the_factors_are_found_but_for_what_the_prior_holds_back() -> None:
    found = relative(refit(schemes(TRUE, 200), STRAY))
    assert found == pytest.approx(relative(TRUE), rel=0.02)


def test_with_noise_the_factors_are_found_more_closely_than_without_a_refit() -> None:
    wanted, ones = relative(TRUE), dict.fromkeys(TRUE, 1.0)

    def off(factors: Mapping[str, float]) -> float:
        return math.fsum(abs(math.log(factors[group] / wanted[group])) for group in wanted)

    for seed in range(5):
        found = relative(refit(schemes(TRUE, 60, noise=0.03, seed=seed), STRAY))
        assert off(found) < 0.4 * off(ones)
        assert found["a first"] < found["b second"] < found["a second"]


def test_few_schemes_move_the_factors_little() -> None:
    """Three schemes cannot tell five groups apart: the additive model is believed the more the less is known."""
    few, many = refit(schemes(TRUE, 3), STRAY), refit(schemes(TRUE, 200), STRAY)
    assert sum(abs(f - 1) for f in few.values()) < sum(abs(f - 1) for f in many.values())


def test_the_less_groups_are_believed_to_stray_the_less_they_do() -> None:
    observed = schemes(TRUE, 10, noise=0.03)
    apart = [sum(abs(f - 1) for f in refit(observed, stray).values()) for stray in (0.02, 0.15, 0.3, 3.0)]
    assert apart == sorted(apart)
    assert apart[0] < 0.2 * apart[2]


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_where_the_additive_model_is_right_to_a_common_factor_all_factors_are_one(scale: float) -> None:
    found = refit(schemes(dict.fromkeys(TRUE, scale), 30), STRAY)
    assert found == pytest.approx(dict.fromkeys(TRUE, 1.0), abs=1e-6)


def test_schemes_far_from_the_best_one_are_not_looked_at() -> None:
    near = schemes(TRUE, 30, noise=0.02)
    best = min(one.kld for one in near)
    far = [Observation(dict.fromkeys(TRUE, 0.5), 1.6 * best), Observation({"output.weight": 5.0}, 40 * best)]
    assert refit([far[0], *near, far[1]], STRAY) == refit(near, STRAY)


def test_a_single_scheme_tells_nothing() -> None:
    one = Observation({"a": 0.1, "b": 0.2}, 0.5)
    assert refit([one], STRAY) == {}
    # Nor does one with all others far away.
    assert refit([one, Observation({"a": 0.4, "b": 0.2}, 5.0)], STRAY) == {}


def test_a_model_that_does_not_diverge_has_no_prices_to_refit() -> None:
    assert refit([Observation({"a": 0.1}, 0.0), Observation({"a": 0.2}, 0.0)], STRAY) == {}


def test_a_group_that_few_schemes_have_costs_nothing_in_the_others() -> None:
    found = refit([Observation({"a": 0.1, "b": 0.1}, 0.2), Observation({"a": 0.2}, 0.2)], STRAY)
    assert found == pytest.approx({"a": 1.0, "b": 1.0}, abs=1e-6)


costs = st.dictionaries(st.sampled_from("abcdef"), st.floats(1e-6, 10.0), min_size=1)
observations = st.lists(st.builds(Observation, costs, st.floats(1e-6, 10.0)), min_size=1, max_size=12)


@settings(deadline=None)
@given(observations, st.floats(0.01, 3.0))
def test_factors_are_positive_and_bounded_whatever_was_measured(found: list[Observation], stray: float) -> None:
    assert all(LEAST <= factor <= MOST for factor in refit(found, stray).values())
