"""What the same types cost under other models of the divergence."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrun.allocation.candidates import (
    Options,
    by_groups,
    candidate,
    linear,
    models,
    perturbed,
    repriced,
    restricted,
    saturating,
)
from dynrun.allocation.operating_point import groups_of
from dynrun.allocation.solve import Option
from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.sensitivity.slopes import Slope

MENU = ("IQ2_XXS", "Q2_K", "IQ3_S", "Q4_K", "Q8_0")
NAMES = [f"blk.{i}.{kind}.weight" for i in range(4) for kind in ("attn_q", "ffn_up")] + ["output.weight"]
ERRORS = {name: {t: 4.0 ** -TENSOR_TYPES[t].bpw for t in MENU} for name in NAMES}
FINE, COARSE = ERRORS[NAMES[0]]["Q4_K"], ERRORS[NAMES[0]]["Q2_K"]
# KLD bends upwards: at the coarse type the slope is four times the fine one's.
SLOPES = {name: Slope(((FINE, FINE * i), (COARSE, COARSE * 4 * i)), 0.05) for i, name in enumerate(NAMES, start=1)}


def options_of(menu: tuple[str, ...] = MENU) -> dict[str, list[Option]]:
    return {
        name: [
            Option(t, int(1000 * TENSOR_TYPES[t].bpw), SLOPES[name].price(ERRORS[name][t]), seconds=0.5) for t in menu
        ]
        for name in NAMES
    }


OPTIONS = options_of()


def cost(options: Options, name: str, type_name: str) -> float:
    return next(option.cost for option in options[name] if option.type == type_name)


def all_but_the_costs(options: Options) -> dict[str, list[tuple[str, int, float]]]:
    return {name: [(o.type, o.nbytes, o.seconds) for o in choices] for name, choices in options.items()}


def test_every_model_prices_the_same_options() -> None:
    found = dict(models(OPTIONS, SLOPES, ERRORS))
    assert list(found) == [
        *("mean slopes", "coarse slopes", "fine slopes", "saturating", "no codebook types", "no types under 2.5 bits")
    ]
    for name in list(found)[:4]:
        assert all_but_the_costs(found[name]) == all_but_the_costs(OPTIONS)
        assert found[name] != OPTIONS


def test_one_slope_agrees_with_the_additive_model_where_it_was_measured() -> None:
    found = dict(models(OPTIONS, SLOPES, ERRORS))
    for number, name in enumerate(NAMES, start=1):
        assert cost(found["fine slopes"], name, "Q4_K") == pytest.approx(FINE * number)
        assert cost(found["coarse slopes"], name, "Q2_K") == pytest.approx(COARSE * 4 * number)
        # The geometric mean of α and 4α is 2α, at every error.
        for t in MENU:
            assert cost(found["mean slopes"], name, t) == pytest.approx(2 * number * ERRORS[name][t])


def test_one_slope_is_a_straight_line_through_nothing() -> None:
    found = linear(OPTIONS, SLOPES, ERRORS, lambda own: own[0])
    for name in NAMES:
        slopes = [cost(found, name, t) / ERRORS[name][t] for t in MENU]
        assert slopes == pytest.approx([slopes[0]] * len(MENU))


def test_a_slope_measured_as_nothing_or_less_makes_no_price_negative() -> None:
    noisy = SLOPES | {NAMES[0]: Slope(((FINE, -1e-6), (COARSE, 0.0)))}
    for name, options in models(OPTIONS, noisy, ERRORS):
        assert all(o.cost >= 0 and math.isfinite(o.cost) for choices in options.values() for o in choices), name


def test_what_has_no_slope_or_no_error_keeps_its_price() -> None:
    """A tensor that no decode touches; a pinned type that is in no menu."""
    unmeasured, other = NAMES[0], NAMES[1]
    pinned = Option("Q6_K", 6562, 0.125)
    options = {**OPTIONS, other: [*OPTIONS[other], pinned]}
    slopes = {name: slope for name, slope in SLOPES.items() if name != unmeasured} | {other: SLOPES[other]}
    found = linear(options, slopes, ERRORS, lambda own: own[-1])
    assert found[unmeasured] == OPTIONS[unmeasured]
    assert cost(found, other, "Q6_K") == 0.125
    assert linear(options, {unmeasured: Slope(())}, ERRORS, lambda own: own[-1])[unmeasured] == OPTIONS[unmeasured]


def test_what_an_option_costs_beyond_its_error_stays_under_every_slope() -> None:
    """As what kernels do to activations, which is no matter of the weight's slope."""
    name = NAMES[0]
    options = {name: [Option(o.type, o.nbytes, o.cost + 0.25) for o in OPTIONS[name]]}
    for choose in (min, max):
        found, without = linear(options, SLOPES, ERRORS, choose), linear(OPTIONS, SLOPES, ERRORS, choose)
        for type_name in MENU:
            assert cost(found, name, type_name) == pytest.approx(cost(without, name, type_name) + 0.25)


prices = st.floats(min_value=0.0, max_value=2.8, allow_subnormal=False)


@settings(deadline=None)
@given(prices, prices)
def test_saturating_prices_rise_with_the_additive_ones_and_stand_above_them(a: float, b: float) -> None:
    low, high = sorted((a, b))
    found = saturating({"x": [Option("Q2_K", 1, high), Option("Q4_K", 2, low)]}, 3.0)["x"]
    assert found[0].cost >= found[1].cost
    # But for rounding.
    assert found[0].cost >= high * (1 - 1e-12)
    assert found[1].cost >= low * (1 - 1e-12)


def test_saturating_prices_of_small_costs_are_the_additive_ones_and_of_huge_ones_finite() -> None:
    small, huge = saturating({"x": [Option("Q4_K", 2, 1e-4), Option("IQ1_S", 1, 50.0)]}, 3.0)["x"]
    assert small.cost == pytest.approx(1e-4, rel=1e-4)
    assert 3.0 < huge.cost < math.inf
    # What is added up is what the tensor alone would show, were it not bounded: c·(1 − exp(−x/c)) gives it back.
    (back,) = saturating({"x": [Option("Q3_K", 1, 2.0)]}, 3.0)["x"]
    assert 3.0 * (1 - math.exp(-back.cost / 3.0)) == pytest.approx(2.0)


def test_a_restricted_menu_holds_what_is_allowed_at_the_same_price() -> None:
    found = dict(models(OPTIONS, SLOPES, ERRORS))
    no_codebooks = {
        name: [o for o in choices if o.type in ("Q2_K", "Q4_K", "Q8_0")] for name, choices in OPTIONS.items()
    }
    assert found["no codebook types"] == no_codebooks
    assert all(o.type != "IQ2_XXS" for choices in found["no types under 2.5 bits"].values() for o in choices)


def test_a_restriction_that_changes_nothing_is_no_candidate() -> None:
    assert restricted(OPTIONS, lambda _: True) is None
    names = [name for name, _ in models(options_of(("Q4_K", "Q8_0")), SLOPES, ERRORS)]
    assert names == ["mean slopes", "coarse slopes", "fine slopes", "saturating"]


def test_a_restriction_that_leaves_a_tensor_nothing_is_no_candidate() -> None:
    assert restricted({**OPTIONS, "x": [Option("IQ4_NL", 1, 0.1)]}, lambda t: not t.startswith("IQ")) is None


def test_perturbed_prices_are_the_same_for_a_seed_and_others_for_another() -> None:
    spreads = {name: slope.spread for name, slope in SLOPES.items()}
    once = perturbed(OPTIONS, spreads, 7)
    assert perturbed(OPTIONS, spreads, 7) == once
    assert perturbed(dict(reversed(OPTIONS.items())), spreads, 7) == once
    assert perturbed(OPTIONS, spreads, 8) != once
    assert all_but_the_costs(once) == all_but_the_costs(OPTIONS)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000))
def test_a_perturbation_keeps_the_order_of_a_tensors_types(seed: int) -> None:
    """One factor a tensor: what is doubted is how much it matters, not which type is better."""
    found = perturbed(OPTIONS, {}, seed)
    for name in NAMES:
        factors = [o.cost / before.cost for o, before in zip(found[name], OPTIONS[name], strict=True)]
        assert factors == pytest.approx([factors[0]] * len(factors))
        assert factors[0] > 0


def spread(spreads: Mapping[str, float], one: str, other: str) -> float:
    """How far apart two tensors' factors are, in the logarithm, over many seeds."""

    def factor(options: Options, name: str) -> float:
        return math.log(cost(options, name, "Q4_K") / cost(OPTIONS, name, "Q4_K"))

    drawn = [perturbed(OPTIONS, spreads, seed) for seed in range(150)]
    return math.sqrt(sum((factor(found, one) - factor(found, other)) ** 2 for found in drawn) / len(drawn))


def test_tensors_are_perturbed_with_their_group_and_by_what_is_not_known_of_them() -> None:
    one, beside, other = (f"blk.{i}.ffn_up.weight" for i in (0, 1, 3))
    within, between = spread({}, one, beside), spread({}, one, other)
    assert within > 0
    assert between > 1.5 * within
    assert spread({beside: 2.0}, one, beside) > 3 * between


def test_a_groups_factor_multiplies_the_costs_of_its_tensors_alone() -> None:
    factors = {"ffn_up.weight second": 3.0, "output.weight": 0.5}
    found = by_groups(OPTIONS, factors)
    groups = groups_of(OPTIONS)
    for name in NAMES:
        factor = factors.get(groups[name], 1.0)
        assert [o.cost for o in found[name]] == pytest.approx([factor * o.cost for o in OPTIONS[name]])
    assert all_but_the_costs(found) == all_but_the_costs(OPTIONS)
    assert by_groups(OPTIONS, {}) == OPTIONS


def test_other_prices_may_depend_on_the_tensor_and_the_option() -> None:
    found = repriced(OPTIONS, lambda name, o: len(name) + o.nbytes)
    assert cost(found, "output.weight", "Q4_K") == 13 + 4500


def test_a_candidate_adds_up_what_was_chosen() -> None:
    types = {name: MENU[i % len(MENU)] for i, name in enumerate(NAMES)}
    found = candidate("by hand", OPTIONS, types)
    assert (found.name, found.types) == ("by hand", types)
    assert found.nbytes == sum(int(1000 * TENSOR_TYPES[t].bpw) for t in types.values())
    assert found.predicted == pytest.approx(sum(cost(OPTIONS, name, t) for name, t in types.items()))
