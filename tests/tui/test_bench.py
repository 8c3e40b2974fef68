"""The Bench room: runs, history, comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from textual.widgets import DataTable, Input

from dynrun.runtime.bench_history import keep, kept
from dynrun.runtime.machine import Device, Machine
from dynrun.runtime.model_facts import facts_of
from dynrun.runtime.placement import Wishes
from dynrun.runtime.plan import plan
from dynrun.tui.messages import Visit
from tests.tiny import write_tiny_llama
from tests.tui.driving import AppPilot, one, running_app, screen_text, shows, wait_until

pytestmark = pytest.mark.tui

GPU = Device("CUDA0", "a GPU", 8 << 30, 8 << 30, 500e9)
DESK = Machine("desk", (GPU,), 16 << 30, 14 << 30, 50e9, 8)


def row(test: str, speeds: tuple[float, ...], placement: str = "auto") -> dict[str, Any]:
    mean = sum(speeds) / len(speeds)
    return {
        "model": "alpha",
        "path": "/alpha.gguf",
        "size_bytes": 1000,
        "placement": placement,
        "test": test,
        "tokens_per_second": mean,
        "stddev": 1.0,
        "ci95": [mean * 0.98, mean * 1.02],
        "rounds": list(speeds),
        "bandwidth_share": 0.5 if test.startswith("tg") else None,
        "noisy": False,
    }


def result(day: int, faster: float = 1.0) -> dict[str, Any]:
    speeds = tuple(faster * speed for speed in (40.0, 40.5, 41.0))
    rows = [row("pp512", tuple(10 * speed for speed in speeds)), row("tg128", speeds), row("tg128", speeds, "cpu")]
    machine = {"name": "desk", "backend": "cpu", "llama_cpp": "0c1e570"}
    return {"time": f"2026-11-{day:02}T12:00:00+0000", "rows": rows, "drift": None, "machine": machine, "elapsed_s": 9}


def fill(pilot: AppPilot, **fields: str) -> None:
    for name, value in fields.items():
        one(pilot, f"#{name}", Input).value = value


@pytest.mark.parametrize("size", [(80, 24), (200, 60)], ids=str)
async def test_past_benches_are_listed_shown_and_compared(size: tuple[int, int]) -> None:
    keep(result(1))
    keep(result(2, faster=1.2))
    async with running_app(size, visit=Visit("bench")) as pilot:
        await shows(pilot, "2026-11-02 12:00")
        await pilot.press("enter")
        await shows(pilot, "486.0")
        assert "50%" in screen_text(pilot)
        assert "llama.cpp 0c1e570" in screen_text(pilot)
        await pilot.press("down", "v")
        await shows(pilot, "+20.0%")
        assert screen_text(pilot).count("faster") == 3


async def test_a_bench_that_has_nothing_in_common_is_not_compared() -> None:
    keep(result(1))
    other = result(2)
    for one_row in other["rows"]:
        one_row["model"] = "beta"
    keep(other)
    async with running_app(visit=Visit("bench")) as pilot:
        await shows(pilot, "2026-11-02")
        await pilot.press("v")
        await shows(pilot, "Enter shows a bench")
        await pilot.press("enter", "down", "v")
        await shows(pilot, "no row in common")


async def test_words_that_are_no_test_are_told() -> None:
    async with running_app(visit=Visit("bench")) as pilot:
        await wait_until(pilot, lambda: pilot.app.current_mode == "bench", "the room")
        fill(pilot, tests="pp")
        await pilot.press("s")
        await shows(pilot, "is no test")


async def test_a_planned_placement_comes_by_its_name(tmp_path: Path) -> None:
    from dynrun.gguf.header import read_header

    model = write_tiny_llama(tmp_path / "tiny.gguf", n_expert=4)
    placement = plan(facts_of(read_header(model)), DESK, Wishes())
    async with running_app(visit=Visit("bench", "tiny", placement, model)) as pilot:
        await shows(pilot, "as planned")
        assert one(pilot, "#placements", Input).value == "ngl=3"


@pytest.mark.native
async def test_a_bench_runs_is_shown_and_kept_and_another_one_is_stopped(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    async with running_app((120, 40), visit=Visit("bench", str(model))) as pilot:
        await wait_until(pilot, lambda: pilot.app.current_mode == "bench", "the room")
        fill(pilot, tests="pp16,tg4", seconds="2", placements="auto,cpu")
        await pilot.press("s")
        await shows(pilot, "round 1 done", timeout_s=120)
        assert "bench: round" in screen_text(pilot).splitlines()[0]
        await wait_until(pilot, lambda: len(kept()) == 1, "the bench", timeout_s=120)
        await wait_until(pilot, lambda: one(pilot, "#rows", DataTable).row_count == 4, "the rows")
        await wait_until(pilot, lambda: one(pilot, "#history", DataTable).row_count == 1, "the history")
        fill(pilot, tests="pp512,tg512", seconds="300")
        await pilot.press("s")
        await shows(pilot, "the first round")
        await pilot.press("ctrl+c")
        await shows(pilot, "stopped")
        assert len(kept()) == 1
