"""The search: a world whose divergence is not what the probes add up to stands in for the model."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
import pytest

from dynrun.allocation.bench import types_key
from dynrun.allocation.candidates import Options
from dynrun.allocation.operating_point import groups_of
from dynrun.allocation.search import Found, Search, SearchSettings
from dynrun.allocation.solve import Option, Solution, solve
from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.sensitivity.slopes import Slope

MENU = ("IQ2_XXS", "Q2_K", "IQ3_XXS", "Q3_K", "IQ4_XS", "Q5_K", "Q6_K")
NAMES = [f"blk.{i}.{kind}.weight" for i in range(6) for kind in ("attn_q", "ffn_up", "ffn_down")] + ["output.weight"]
ERRORS = {name: {t: 4.0 ** -TENSOR_TYPES[t].bpw for t in MENU} for name in NAMES}
N_WEIGHTS = {name: 4096 * (1 + zlib.crc32(name.encode()) % 5) for name in NAMES}
FINE, COARSE = ERRORS[NAMES[0]]["Q5_K"], ERRORS[NAMES[0]]["IQ3_XXS"]
# What the tensors really cost together, over what they cost alone.
FACTORS = {"ffn_down.weight first": 2.2, "ffn_down.weight second": 1.6, "attn_q.weight first": 0.5}


def slope_of(name: str) -> Slope:
    alpha = 0.5 + zlib.crc32(b"slope" + name.encode()) % 100 / 10
    return Slope(((FINE, alpha * FINE), (COARSE, 1.3 * alpha * COARSE)), spread=0.1)


SLOPES = {name: slope_of(name) for name in NAMES}


def options_of(menu: tuple[str, ...] = MENU) -> dict[str, list[Option]]:
    return {
        name: [Option(t, TENSOR_TYPES[t].nbytes(N_WEIGHTS[name]), SLOPES[name].price(ERRORS[name][t])) for t in menu]
        for name in NAMES
    }


OPTIONS = options_of()
BUDGET = int(3.3 / 8 * sum(N_WEIGHTS.values()))


@dataclass
class World:
    """KLD: the sum over groups of price × factor; hard and easy sequences, and what a scheme does to each by chance."""

    factors: Mapping[str, float]
    noise: float = 0.0
    measured: list[dict[str, str]] = field(default_factory=list)
    weights: list[int] = field(default_factory=lambda: [100, 250, 180, 90, 256, 31])

    def scheme(self, types: Mapping[str, str]) -> list[float]:
        self.measured.append(dict(types))
        groups = groups_of(NAMES)
        kld = sum(
            self.factors.get(groups[name], 1.0) * SLOPES[name].price(ERRORS[name][t]) for name, t in types.items()
        )
        hardness = np.linspace(0.5, 1.5, len(self.weights))
        chance = np.random.default_rng(zlib.crc32(types_key(types).encode())).standard_normal(len(self.weights))
        return [float(one) for one in kld * hardness * np.exp(self.noise * chance)]


@dataclass
class Told:
    """What the search said: (done, total, note)."""

    lines: list[tuple[float, float, str]] = field(default_factory=list)

    def __call__(self, done: float, total: float, note: str = "") -> None:
        self.lines.append((done, total, note))


def nothing(_: str) -> float:
    return 0.0


def run(
    world: World,
    *,
    options: Options = OPTIONS,
    budget: int = BUDGET,
    unseen: Callable[[str], float] = nothing,
    told: Told | None = None,
    **settings: int,
) -> Found:
    chosen = SearchSettings(**({"n_candidates": 10, "rounds": 3} | settings))
    solver = partial(_solved, budget)
    told = told or Told()
    return Search(options, solver, SLOPES, ERRORS, dict.fromkeys(NAMES, unseen), world, chosen, told).run()


def _solved(budget: int, options: Options) -> Solution:
    return solve(options, budget, gap=1e-3)


@cache
def usual() -> Found:
    """In a world without chance."""
    return run(World(FACTORS))


def by_name(found: Found) -> dict[str, float]:
    return {trial.candidate.name: trial.kld for trial in found.trials}


@pytest.mark.parametrize("n_candidates", [8, 14])
def test_as_many_different_schemes_are_measured_as_were_asked_for_each_once(n_candidates: int) -> None:
    world = World(FACTORS, noise=0.02)
    found = run(world, n_candidates=n_candidates, rounds=0)
    keys = {types_key(types) for types in world.measured}
    assert len(world.measured) == len(keys) == len(found.trials) == n_candidates


def test_the_other_models_are_tried_before_perturbations_are() -> None:
    names = set(by_name(run(World({}), n_candidates=1, rounds=0)))
    assert "additive" in names
    assert names <= {
        *("additive", "mean slopes", "coarse slopes", "fine slopes", "saturating"),
        *("no codebook types", "no types under 2.5 bits"),
    }


def test_a_search_ends_where_there_are_not_so_many_schemes() -> None:
    options = {NAMES[0]: OPTIONS[NAMES[0]][:2], NAMES[1]: OPTIONS[NAMES[1]][:1]}
    world = World({})
    found = run(world, options=options, n_candidates=30)
    assert 1 <= len(found.trials) <= 2
    assert len(world.measured) == len(found.trials)


def test_one_scheme_alone_has_no_runner_up() -> None:
    options = {name: choices[:1] for name, choices in OPTIONS.items()}
    found = run(World(FACTORS), options=options)
    assert [trial.candidate.name for trial in found.trials] == ["additive"]
    assert (found.ratio, found.factors) == (None, {})


def test_the_winner_is_what_measured_least_and_the_rest_follows_in_order() -> None:
    world = World(FACTORS, noise=0.1)
    found = run(world)
    klds = [float(np.average(world.scheme(types), weights=world.weights)) for types in list(world.measured)]
    assert found.best.kld == pytest.approx(min(klds))
    assert [trial.kld for trial in found.trials] == pytest.approx(sorted(klds))


def test_the_prediction_is_the_additive_models_for_every_candidate() -> None:
    """Whichever prices found a scheme: predictions of one model can be compared."""
    for trial in usual().trials:
        wanted = sum(SLOPES[name].price(ERRORS[name][t]) for name, t in trial.candidate.types.items())
        assert trial.candidate.predicted == pytest.approx(wanted)


def test_where_groups_cost_otherwise_than_their_probes_say_a_refit_is_better() -> None:
    found = usual()
    klds = by_name(found)
    assert found.best.kld < 0.985 * klds["additive"]
    assert min(kld for name, kld in klds.items() if name.startswith("refit")) < 0.995 * klds["additive"]
    # The factors point where the world's do.
    assert found.factors["ffn_down.weight first"] > 1.1 > 0.9 > found.factors["attn_q.weight first"]


def test_in_a_world_that_adds_up_nothing_beats_the_additive_scheme() -> None:
    found = run(World({}))
    assert found.best.kld == pytest.approx(by_name(found)["additive"], rel=1e-3)
    assert list(found.factors.values()) == pytest.approx([1.0] * len(found.factors), abs=1e-3)


def test_what_weights_in_place_do_not_show_counts_for_every_candidate() -> None:
    """Types of the same KLD in place, of which one has kernels that cost more: the other wins."""

    def unseen(type_name: str) -> float:
        return 0.5 if type_name.startswith("IQ") else 0.0

    world = World(FACTORS)
    found = run(world, unseen=unseen, rounds=0)
    for trial in found.trials:
        n_codebook = sum(t.startswith("IQ") for t in trial.candidate.types.values())
        in_place = float(np.average(world.scheme(trial.candidate.types), weights=world.weights))
        assert trial.kld == pytest.approx(in_place + 0.5 * n_codebook)
    assert not any(t.startswith("IQ") for t in found.best.candidate.types.values())
    assert any(t.startswith("IQ") for t in usual().best.candidate.types.values())


def test_refits_end_when_nothing_new_or_better_comes_of_them() -> None:
    n_refits = sum(name.startswith("refit") for name in by_name(run(World(FACTORS), rounds=40)))
    assert 1 <= n_refits < 20
    assert not any(name.startswith("refit") for name in by_name(run(World(FACTORS), rounds=0)))


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_runner_up_is_no_better(noise: float) -> None:
    found = run(World(FACTORS, noise=noise)) if noise else usual()
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(found.trials[0].kld / found.trials[1].kld)
    assert found.ratio.value <= 1
    assert found.ratio.ci95[0] <= found.ratio.value <= found.ratio.ci95[1]


def test_the_same_world_gives_the_same_result() -> None:
    again = World(FACTORS)
    assert run(again) == usual()
    assert len(again.measured) == len(usual().trials)


@pytest.mark.parametrize("bpw", [2.3, 4.7])
def test_every_scheme_is_within_the_budget(bpw: float) -> None:
    budget = int(bpw / 8 * sum(N_WEIGHTS.values()))
    for trial in run(World(FACTORS, noise=0.1), budget=budget).trials:
        nbytes = sum(TENSOR_TYPES[t].nbytes(N_WEIGHTS[name]) for name, t in trial.candidate.types.items())
        assert trial.candidate.nbytes == nbytes <= budget


def test_a_restricted_menu_that_is_too_large_for_the_size_is_left_out() -> None:
    budget = int(2.4 / 8 * sum(N_WEIGHTS.values()))
    found = run(World({}), budget=budget, n_candidates=8)
    names = by_name(found)
    # Without codebooks the smallest type is Q2_K, of 2.625 bits.
    assert not {"no codebook types", "no types under 2.5 bits"} & set(names)
    assert len(names) >= 8


def test_every_measurement_is_told_with_how_many_there_will_be() -> None:
    world, told = World(FACTORS), Told()
    run(world, told=told, n_candidates=10)
    assert [done for done, _, _ in told.lines] == list(range(1, len(world.measured) + 1))
    assert all(done <= total and total >= 10 for done, total, _ in told.lines)
    assert told.lines[0][2].startswith("additive: KLD ")
