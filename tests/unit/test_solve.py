"""The allocation's solver, against brute force and against itself."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrun.allocation.solve import Option, TooSlowError, solve
from dynrun.errors import DoesNotFitError
from dynrun.gguf.tensor_types import DEFAULT_MENU, TENSOR_TYPES

Options = dict[str, list[Option]]
GAP = 1e-4
ROOT = Path(__file__).parents[2]
SLACK = 1 + GAP + 1e-8

COSTS = st.one_of(
    st.just(0.0), st.floats(-9, 2).map(lambda exponent: 10.0**exponent), st.integers(1, 5).map(lambda n: n / 8)
)
SIZES = st.one_of(st.integers(1, 40), st.integers(1, 2000).map(lambda n: n * 4608))


@st.composite
def instances(draw: st.DrawFn, max_tensors: int = 5, sizes: st.SearchStrategy[int] = SIZES) -> tuple[Options, int]:
    """Options of a few tensors, and a budget between the smallest and the largest choice."""
    options = {}
    for tensor in range(draw(st.integers(1, max_tensors))):
        pairs = draw(st.lists(st.tuples(sizes, COSTS), min_size=1, max_size=5))
        options[f"t{tensor}"] = [Option(f"Q{i}", nbytes, cost) for i, (nbytes, cost) in enumerate(pairs)]
    smallest = sum(min(o.nbytes for o in choices) for choices in options.values())
    largest = sum(max(o.nbytes for o in choices) for choices in options.values())
    return options, draw(st.integers(smallest, largest))


def brute_force(options: Options, budget: int) -> float:
    choices = itertools.product(*options.values())
    return min(math.fsum(o.cost for o in choice) for choice in choices if sum(o.nbytes for o in choice) <= budget)


@st.composite
def timed_instances(draw: st.DrawFn) -> tuple[Options, int, float]:
    """Like :func:`instances`, with seconds, and a limit of time that the smallest, the fastest or no choice meets."""
    options, budget = draw(instances(max_tensors=4))
    times = st.one_of(st.just(0.0), st.integers(1, 40).map(lambda n: n / 64), st.floats(1e-6, 1e-3))
    options = {name: [replace(o, seconds=draw(times)) for o in choices] for name, choices in options.items()}
    slowest = math.fsum(max(o.seconds for o in choices) for choices in options.values())
    return options, budget, draw(st.floats(0, 1)) * slowest


def brute_force_timed(options: Options, budget: int, max_seconds: float) -> float | None:
    """The least cost within both limits; None where nothing is."""
    choices = (c for c in itertools.product(*options.values()) if sum(o.nbytes for o in c) <= budget)
    costs = [math.fsum(o.cost for o in c) for c in choices if math.fsum(o.seconds for o in c) <= max_seconds]
    return min(costs, default=None)


def least_seconds(options: Options, budget: int) -> float:
    choices = (c for c in itertools.product(*options.values()) if sum(o.nbytes for o in c) <= budget)
    return min(math.fsum(o.seconds for o in c) for c in choices)


def priced(options: Options, types: dict[str, str]) -> tuple[int, float]:
    """The bytes and the cost of a choice, added up by the test."""
    chosen = [next(o for o in options[name] if o.type == type_name) for name, type_name in types.items()]
    return sum(o.nbytes for o in chosen), math.fsum(o.cost for o in chosen)


def realistic() -> Options:
    """30 layers of 7 tensors, embeddings, and every type of the menu; costs over eleven decades."""
    random = np.random.default_rng(5)
    elements = {"attn_q": 768 * 768, "attn_k": 768 * 256, "attn_v": 768 * 256, "attn_output": 768 * 768}
    elements |= {"ffn_gate": 768 * 2048, "ffn_up": 768 * 2048, "ffn_down": 768 * 2048}
    tensors = {f"blk.{layer}.{kind}.weight": n for layer in range(30) for kind, n in elements.items()}
    tensors["token_embd.weight"] = 768 * 151936
    options = {}
    for name, n in tensors.items():
        slope = 10 ** random.uniform(-5, 1)
        kinds = [TENSOR_TYPES[type_name] for type_name in DEFAULT_MENU]
        options[name] = [
            Option(kind.name, kind.nbytes(n), float(slope * 4.0**-kind.bpw * random.uniform(0.7, 1.4)))
            for kind in kinds
        ]
    return options


def budget_at(bpw: float) -> int:
    """Bytes of the realistic model at so many bits per weight."""
    return int(sum(choices[-1].nbytes // 2 for choices in realistic().values()) * bpw / 8)


@given(instances())
@settings(deadline=None)
def test_is_as_good_as_brute_force_and_never_over_budget(instance: tuple[Options, int]) -> None:
    options, budget = instance
    solution = solve(options, budget)
    best = brute_force(options, budget)
    assert set(solution.types) == set(options)
    assert (solution.nbytes, solution.cost) == priced(options, solution.types)
    assert solution.nbytes <= budget
    assert solution.bound <= best * (1 + 1e-8)
    assert best <= solution.cost <= best * SLACK


@given(instances(max_tensors=4, sizes=st.integers(0, 60).map(lambda n: 10**12 + n)))
@settings(deadline=None, max_examples=50)
def test_counts_single_bytes_of_huge_tensors(instance: tuple[Options, int]) -> None:
    options, budget = instance
    solution = solve(options, budget)
    assert priced(options, solution.types)[0] <= budget
    assert solution.cost <= brute_force(options, budget) * SLACK


@given(instances(max_tensors=3, sizes=st.integers(1, 10**13)))
@settings(deadline=None, max_examples=50)
def test_holds_the_budget_where_floats_are_too_coarse_for_it(instance: tuple[Options, int]) -> None:
    options, _ = instance
    # Exactly the bytes of a choice, less one: within any float tolerance of it.
    budget = max(sum(o.nbytes for o in choice) for choice in itertools.product(*options.values())) - 1
    smallest = sum(min(o.nbytes for o in choices) for choices in options.values())
    if budget < smallest:
        budget = smallest
    solution = solve(options, budget)
    assert priced(options, solution.types)[0] <= budget
    assert solution.cost <= brute_force(options, budget) * SLACK


@given(instances(), st.integers(0, 10_000))
@settings(deadline=None, max_examples=50)
def test_more_budget_is_never_worse(instance: tuple[Options, int], more: int) -> None:
    options, budget = instance
    assert solve(options, budget + more).cost <= solve(options, budget).cost * SLACK


@given(instances())
@settings(deadline=None, max_examples=50)
def test_never_chooses_a_dominated_option(instance: tuple[Options, int]) -> None:
    options, budget = instance
    for name, chosen_type in solve(options, budget).types.items():
        chosen = next(o for o in options[name] if o.type == chosen_type)
        better = [
            o
            for o in options[name]
            if o.nbytes <= chosen.nbytes
            and o.cost <= chosen.cost
            and (o.nbytes, o.cost) != (chosen.nbytes, chosen.cost)
        ]
        assert better == []


@given(instances())
@settings(deadline=None, max_examples=50)
def test_the_result_depends_on_nothing_but_the_options(instance: tuple[Options, int]) -> None:
    options, budget = instance
    shuffled = {name: list(reversed(options[name])) for name in reversed(options)}
    assert solve(shuffled, budget) == solve(options, budget)


def test_spends_the_whole_budget_where_that_helps() -> None:
    options = {name: [Option("Q2_K", 10, 1.0), Option("Q8_0", 30, 0.0)] for name in "abc"}
    solution = solve(options, 75)
    assert (solution.nbytes, solution.cost) == (70, 1.0)
    assert solution.bound == pytest.approx(1.0)


def test_takes_the_cheapest_of_all_where_everything_fits() -> None:
    options = {"a": [Option("Q2_K", 10, 1.0), Option("F16", 30, 0.5), Option("Q8_0", 20, 0.5)]}
    solution = solve(options, 1000)
    assert (solution.types, solution.nbytes, solution.cost, solution.bound) == ({"a": "Q8_0"}, 20, 0.5, 0.5)


def test_nothing_to_choose_costs_nothing() -> None:
    solution = solve({}, 0)
    assert (solution.types, solution.nbytes, solution.cost) == ({}, 0, 0.0)


@pytest.mark.parametrize("bpw", [2.0, 3.5, 7.0])
def test_a_realistic_model_is_solved_to_the_gap(bpw: float) -> None:
    options, budget = realistic(), budget_at(bpw)
    solution = solve(options, budget)
    assert solution.cost - solution.bound <= GAP * solution.cost
    assert 0.999 * budget <= solution.nbytes <= budget


@given(timed_instances())
@settings(deadline=None, max_examples=150)
def test_two_limits_are_kept_as_well_as_brute_force_keeps_them(instance: tuple[Options, int, float]) -> None:
    options, budget, limit = instance
    best = brute_force_timed(options, budget, limit)
    try:
        solution = solve(options, budget, max_seconds=limit)
    except TooSlowError as error:
        refused = error.least_seconds
        solution = None
    if solution is None:
        # What is nearer to the limit than the gap may be refused.
        assert limit < refused <= least_seconds(options, budget) * SLACK
        return
    assert best is not None
    assert solution.nbytes <= budget
    assert solution.seconds <= limit
    assert best * (1 - 1e-9) <= solution.cost <= best * SLACK
    assert solution.bound <= best * (1 + 1e-9)


@given(instances(max_tensors=12), st.lists(st.integers(0, 10**7), min_size=3, max_size=3))
@settings(deadline=None, max_examples=500)
def test_never_over_budget_and_never_worse_with_more_given_the_smaller_ones_solution(
    instance: tuple[Options, int], more: list[int]
) -> None:
    options, budget = instance
    known = solve(options, budget)
    for extra in sorted(more):
        solution = solve(options, budget + extra, incumbent=known.types)
        assert (solution.nbytes, solution.cost) == priced(options, solution.types)
        assert solution.nbytes <= budget + extra
        assert solution.cost <= known.cost
        known = solution


@given(timed_instances(), st.integers(0, 10**6), st.floats(1, 2))
@settings(deadline=None, max_examples=100)
def test_the_incumbent_holds_with_two_limits(instance: tuple[Options, int, float], more: int, slower: float) -> None:
    options, budget, limit = instance
    try:
        known = solve(options, budget, max_seconds=limit)
    except TooSlowError:
        return
    solution = solve(options, budget + more, max_seconds=limit * slower, incumbent=known.types)
    assert solution.cost <= known.cost
    assert solution.nbytes <= budget + more
    assert solution.seconds <= limit * slower


@pytest.mark.parametrize("types", [{}, {"a": "Q8_0"}, {"a": "F16", "b": "Q8_0"}, {"a": "Q8_0", "b": "Q8_0"}])
def test_an_incumbent_that_is_no_choice_here_is_ignored(types: dict[str, str]) -> None:
    options = {name: [Option("Q2_K", 10, 1.0), Option("Q8_0", 30, 0.5)] for name in "ab"}
    assert solve(options, 40, incumbent=types) == solve(options, 40)


def test_a_speed_out_of_reach_says_the_least_time() -> None:
    options = {name: [Option("IQ2_S", 10, 1.0, seconds=0.4), Option("Q4_0", 20, 0.5, seconds=0.1)] for name in "ab"}
    assert solve(options, 30, max_seconds=0.5).seconds == 0.5
    with pytest.raises(TooSlowError, match=r"the least possible is 0\.5 s") as error:
        solve(options, 30, max_seconds=0.49)
    assert error.value.least_seconds == 0.5


def test_without_a_limit_of_time_seconds_decide_nothing() -> None:
    options = {"a": [Option("Q4_0", 20, 0.5, seconds=9.0), Option("Q4_K", 20, 0.4, seconds=99.0)]}
    solution = solve(options, 20)
    assert (solution.types, solution.seconds) == ({"a": "Q4_K"}, 99.0)


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_a_realistic_model_with_a_speed_is_solved_to_the_gap(share: float) -> None:
    options = {
        name: [replace(o, seconds=o.nbytes * (2e-9 if o.type.startswith("IQ") else 1e-9)) for o in choices]
        for name, choices in realistic().items()
    }
    budget = budget_at(3.5)
    free = solve(options, budget)
    fastest = solve({n: [replace(o, cost=o.seconds) for o in choices] for n, choices in options.items()}, budget).cost
    limit = fastest + share * (free.seconds - fastest)
    solution = solve(options, budget, max_seconds=limit)
    assert free.cost < solution.cost <= solution.bound / (1 - GAP - 1e-8)
    assert solution.nbytes <= budget
    assert 0.99 * limit < solution.seconds <= limit


def test_nothing_is_printed_among_a_command_s_json() -> None:
    # A process of its own: C buffers what it prints, and writes it at the end.
    code = "from tests.unit.test_solve import budget_at, realistic, solve\n"
    code += "print(len(solve(realistic(), budget_at(6.0), gap=1e-7).types))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "211\n"


def test_a_budget_below_the_smallest_says_the_smallest() -> None:
    options = {"a": [Option("Q2_K", 1_500_000, 1.0)], "b": [Option("Q2_K", 250_000, 1.0), Option("F16", 10**7, 0.0)]}
    assert solve(options, 1_750_000).nbytes == 1_750_000
    with pytest.raises(DoesNotFitError, match=r"1,750,000 bytes \(1\.8 MB\)"):
        solve(options, 1_749_999)


@pytest.mark.parametrize("cost", [math.nan, math.inf, -1.0])
def test_a_cost_that_is_no_price_is_refused(cost: float) -> None:
    with pytest.raises(ValueError, match=r"blk\.0 as Q2_K"):
        solve({"blk.0": [Option("Q2_K", 1, cost)]}, 10)


def test_a_tensor_without_options_is_refused() -> None:
    with pytest.raises(ValueError, match=r"blk\.0 has no options"):
        solve({"blk.0": []}, 10)
