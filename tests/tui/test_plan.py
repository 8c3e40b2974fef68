"""The Plan room: quants with verdicts, sliders that re-plan, what is carried to other rooms."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from textual.widgets import Static

from dynrun.tui.messages import Visit
from dynrun.tui.screens.plan import PlanScreen
from dynrun.tui.widgets.slider import Slider
from tests.tiny import write_tiny_llama
from tests.tui.driving import AppPilot, one, paste, running_app, screen_text, shows, type_text, wait_until

pytestmark = pytest.mark.tui

DESK = """
name = "desk"
ram_gib = 16
ram_gb_per_s = 50
[[device]]
name = "CUDA0"
memory_gib = {gib}
gb_per_s = 500
"""


@asynccontextmanager
async def planned(
    tmp_path: Path, gib: float = 8, n_expert: int = 4, size: tuple[int, int] = (80, 24)
) -> AsyncIterator[AppPilot]:
    """A tiny model of experts, planned for a machine with a GPU, by keys."""
    machine = tmp_path / "desk.toml"
    machine.write_text(DESK.format(gib=gib), encoding="utf-8")
    model = write_tiny_llama(tmp_path / "tiny.gguf", n_block=6, n_expert=n_expert, n_ctx_train=8192)
    async with running_app(size) as pilot:
        await pilot.press("f3")
        await wait_until(pilot, lambda: isinstance(pilot.app.screen, PlanScreen), "the room")
        await pilot.press("ctrl+p")
        await type_text(pilot, "another")
        await shows(pilot, "Plan for another machine")
        await pilot.press("enter")
        await shows(pilot, "TOML file")
        await paste(pilot, str(machine))
        await pilot.press("enter", "o")
        await shows(pilot, "Which model?")
        await paste(pilot, str(model))
        await pilot.press("enter")
        await shows(pilot, "tokens/s")
        yield pilot


def slider(pilot: AppPilot, name: str) -> Slider:
    found: Slider = one(pilot, f"#{name}", Slider)
    return found


def command(pilot: AppPilot) -> str:
    """All of it: how much of it stands on the screen depends on how long the model's path is."""
    return str(one(pilot, "#command", Static).content)


@pytest.mark.parametrize("size", [(80, 24), (200, 60)], ids=str)
async def test_a_model_is_planned_with_bars_map_and_command(tmp_path: Path, size: tuple[int, int]) -> None:
    async with planned(tmp_path, size=size) as pilot:
        text = screen_text(pilot)
        assert "all on GPU" in text
        assert "(estimated)" in text
        assert "6 layers, output" in text
        assert "██████ █" in text
        assert "CUDA0" in text
        assert "llama-server -m" in text
        assert "-ngl 7" in command(pilot)


async def test_sliders_move_layers_and_experts_into_ram_and_a_gives_them_back(tmp_path: Path) -> None:
    async with planned(tmp_path) as pilot:
        await pilot.press("enter", "tab", "tab", "tab")
        assert pilot.app.focused is slider(pilot, "n_cpu_moe")
        await pilot.press("right", "right")
        await shows(pilot, "by hand")
        await shows(pilot, "████▄▄ █")
        await shows(pilot, "····▒▒")
        await wait_until(pilot, lambda: "-ot" in command(pilot), "experts in RAM")
        await pilot.press("shift+tab", "left", "left", "left")
        await shows(pilot, "···█▄▄ █")
        await pilot.press("a")
        await wait_until(pilot, lambda: "by hand" not in screen_text(pilot), "the planner's own")
        await shows(pilot, "██████ █")


async def test_context_and_cache_type_change_the_memory_needed(tmp_path: Path) -> None:
    async with planned(tmp_path) as pilot:
        await pilot.press("enter", "end")
        await shows(pilot, "at 8k of context")
        await pilot.press("home", "right")
        await shows(pilot, "at 2k of context")
        await pilot.press("tab", "right")
        await wait_until(pilot, lambda: "-ctk q8_0" in command(pilot), "the other type")


async def test_a_slider_follows_the_mouse(tmp_path: Path) -> None:
    async with planned(tmp_path) as pilot:
        knob = slider(pilot, "n_ctx")
        await pilot.click(knob, offset=(knob.size.width - 8, 0))
        await wait_until(pilot, lambda: knob.value == 8192, "the knob")
        await pilot.click(knob, offset=(15, 0))
        await wait_until(pilot, lambda: knob.value == 0, "the knob")


async def test_what_does_not_fit_says_why(tmp_path: Path) -> None:
    async with planned(tmp_path, gib=0.02) as pilot:
        await pilot.press("enter", "tab", "tab", "end")
        await shows(pilot, "does not fit, by hand")
        await shows(pilot, "CUDA0 needs")


async def test_a_model_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "none.gguf").write_bytes(b"GGUF")
    async with running_app(visit=Visit("plan", str(tmp_path / "none.gguf"))) as pilot:
        await shows(pilot, "a whole GGUF: it does not begin")


async def test_y_copies_the_command(tmp_path: Path) -> None:
    async with planned(tmp_path) as pilot:
        await pilot.press("y")
        await wait_until(pilot, lambda: pilot.app.clipboard.startswith("llama-server -m"), "the clipboard")
        assert "tiny.gguf" in pilot.app.clipboard
