"""Where the tokens of probes go: a world with known slopes and noise stands in for the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dynrun.sensitivity.adaptive import Choices, Progress, Spent, expected_losses, spend
from dynrun.sensitivity.estimate import estimate
from dynrun.sensitivity.probe_log import ProbeLog
from dynrun.sensitivity.slopes import Slope
from dynrun.sensitivity.sweep import Job, Probe
from dynrun.sensitivity.units import Unit, units

ERRORS = {"Q3_K": 0.03, "Q5_K": 0.002}
TYPES = list(ERRORS)
N_SEQUENCES = 16


class World:
    """Tensors with known slopes; a sequence's KLD is its tensor's, times the sequence's hardness, times noise."""

    def __init__(self, slopes: dict[str, float], noise: float, seed: int = 0) -> None:
        self.slopes, self.noise = slopes, noise
        rng = np.random.default_rng(seed)
        self.hardness = np.exp(0.5 * rng.standard_normal(N_SEQUENCES))
        self.draws = {name: rng.standard_normal(N_SEQUENCES) for name in slopes}
        self.n_probed = 0

    def kld(self, name: str, type_name: str, i: int) -> float:
        return float(
            self.slopes[name] * ERRORS[type_name] * self.hardness[i] * np.exp(self.noise * self.draws[name][i])
        )

    def run(self, jobs: Iterable[Job]) -> Iterator[Probe]:
        for job in jobs:
            self.n_probed += job.last - job.first
            klds = [sum(self.kld(name, t, i) for name, t in job.types.items()) for i in range(job.first, job.last)]
            errors = [ERRORS[t] for t in job.types.values()]
            yield Probe(job.name, job.types, job.first, errors, klds, [100] * len(klds), 0.0, 0.0)


def choices(names: Iterable[str]) -> dict[str, Choices]:
    bits = np.array([2.0, 2.6, 3.4, 4.5, 5.5, 6.6, 8.5])
    return {name: Choices(np.exp2(-2 * bits), bits * 1000) for name in names}


def tensors(n: int) -> dict[str, float]:
    rng = np.random.default_rng(1)
    return {f"blk.{i}.ffn_up.weight": float(np.exp(rng.standard_normal())) for i in range(n)}


def run(world: World, path: Path, wanted: float, group: str = "") -> Spent:
    found = units(dict.fromkeys(world.slopes, TYPES), group, dict.fromkeys(world.slopes, 1.0))
    return spend(
        *(found, choices(world.slopes), ProbeLog(path), world),
        n_sequences=N_SEQUENCES,
        wanted=wanted,
        progress=lambda _: None,
    )


def test_without_noise_every_tensor_gets_its_slope_from_few_sequences(tmp_path: Path) -> None:
    world = World(tensors(20), noise=0.0)
    spent = run(world, tmp_path / "log", 0.005)
    relative = [spent.slopes[name].at(0.01) / slope for name, slope in world.slopes.items()]
    assert np.ptp(relative) / np.mean(relative) == pytest.approx(0, abs=1e-6)
    # Two sequences of two types each.
    assert world.n_probed == 20 * 4
    assert spent.doubt == pytest.approx(0, abs=1e-9)


def test_noise_costs_more_sequences_and_not_for_all_tensors_alike(tmp_path: Path) -> None:
    slopes = tensors(30)
    world = World(slopes, noise=0.3)
    spent = run(world, tmp_path / "log", 0.01)
    log = ProbeLog(tmp_path / "log")
    counts = [len(klds) for (_, types), klds in log.klds.items() if types[0][1] == "Q3_K"]
    assert spent.doubt <= 0.01
    assert min(counts) < max(counts)
    assert sum(counts) < 30 * N_SEQUENCES


def test_the_smaller_the_wanted_error_the_more_is_probed(tmp_path: Path) -> None:
    probed = []
    for wanted in (0.2, 0.05, 0.0):
        world = World(tensors(20), noise=0.5)
        run(world, tmp_path / str(wanted), wanted)
        probed.append(world.n_probed)
    assert probed[0] < probed[1] < probed[2]
    # All sequences of the coarse type, half of them of the fine one.
    assert probed[2] == 20 * (N_SEQUENCES + N_SEQUENCES // 2)


def test_an_interrupted_run_ends_with_the_same_slopes(tmp_path: Path) -> None:
    slopes = tensors(12)
    whole = run(World(slopes, noise=0.5), tmp_path / "whole", 0.01)
    lines = (tmp_path / "whole").read_text().splitlines(keepends=True)
    for kept in (1, len(lines) // 2, len(lines) - 1):
        path = tmp_path / f"torn-{kept}"
        # The next line was being written.
        path.write_text("".join(lines[:kept]) + lines[kept][:30])
        assert run(World(slopes, noise=0.5), path, 0.01) == whole


def test_a_later_line_does_not_change_what_earlier_rounds_decided(tmp_path: Path) -> None:
    """A log may hold more than a round asks for: estimates use the round's sequences only."""
    world = World(tensors(6), noise=0.5)
    found = units(dict.fromkeys(world.slopes, TYPES), "", dict.fromkeys(world.slopes, 1.0))
    small, large = ProbeLog(tmp_path / "small"), ProbeLog(tmp_path / "large")
    for log, n in ((small, 2), (large, 8)):
        for unit in found:
            for types in unit.types:
                for probe in world.run([Job(unit.name, types, 0, n)]):
                    log.add(probe)
    counts = dict.fromkeys((unit.name for unit in found), 2)
    assert estimate(found, small, counts) == estimate(found, large, counts)


def test_hard_sequences_do_not_raise_the_tensors_that_saw_them(tmp_path: Path) -> None:
    """Two equal tensors, one measured on two sequences and one on all sixteen, get equal slopes."""
    world = World({"blk.0.a.weight": 1.0, "blk.1.a.weight": 1.0}, noise=0.0)
    found = units(dict.fromkeys(world.slopes, TYPES), "", dict.fromkeys(world.slopes, 1.0))
    log = ProbeLog(tmp_path / "log")
    counts = {"blk.0.a.weight": 2, "blk.1.a.weight": N_SEQUENCES}
    for unit in found:
        for types in unit.types:
            for probe in world.run([Job(unit.name, types, 0, counts[unit.name])]):
                log.add(probe)
    slopes = estimate(found, log, counts)
    assert slopes["blk.0.a.weight"].at(0.01) == pytest.approx(slopes["blk.1.a.weight"].at(0.01))


def test_a_group_shares_its_kld_by_the_errors(tmp_path: Path) -> None:
    world = World({f"blk.{i}.a.weight": 2.0 for i in range(4)}, noise=0.0)
    spent = run(world, tmp_path / "log", 0.01, group="kind:2")
    mean = float(world.hardness[:2].mean())
    for name in world.slopes:
        assert spent.slopes[name].at(0.03) == pytest.approx(2.0 * mean, rel=1e-6)
    # Two groups, two types, two sequences.
    assert world.n_probed == 8


def test_what_changes_no_choice_costs_nothing() -> None:
    """A tensor with one type alone has nothing to decide, however uncertain its slope is."""
    slopes = {"a": Slope(((0.01, 0.01),), spread=1.0), "b": Slope(((0.01, 0.01),), spread=0.3)}
    options = {"a": Choices(np.array([0.01]), np.array([100.0])), **choices(["b"])}
    losses = expected_losses(slopes, options)
    assert losses[0].max() == 0
    assert losses[1].max() > 0


def test_progress_counts_every_probe_once(tmp_path: Path) -> None:
    seen: list[Progress] = []
    world = World(tensors(5), noise=0.5)
    found: list[Unit] = units(dict.fromkeys(world.slopes, TYPES), "", dict.fromkeys(world.slopes, 1.0))
    spend(
        *(found, choices(world.slopes), ProbeLog(tmp_path / "log"), world),
        n_sequences=4,
        wanted=0.0,
        progress=seen.append,
    )
    assert [one.done for one in seen] == list(range(1, len(seen) + 1))
    assert all(one.done <= one.total for one in seen)
