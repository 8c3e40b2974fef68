"""The Make room by keys: a real `make` of a tiny model, stopped and gone on with; the curve; what it says of faults."""

from __future__ import annotations

from pathlib import Path

import pytest
from textual.widgets import Checkbox, Input

from dynrun.gguf.header import read_header
from dynrun.tui.make_worker import probe_of
from dynrun.tui.order import LABELS
from dynrun.tui.screens.make import MakeScreen
from dynrun.tui.widgets.sensitivity_map import SensitivityMap
from dynrun.tui.widgets.slider import Slider
from tests.tiny import write_tiny_llama
from tests.tui.driving import AppPilot, one, running_app, screen_text, shows, wait_until

pytestmark = pytest.mark.tui


async def to_make(pilot: AppPilot) -> MakeScreen:
    await pilot.press("f5")
    await wait_until(pilot, lambda: isinstance(pilot.app.screen, MakeScreen), "the room")
    screen = pilot.app.screen
    assert isinstance(screen, MakeScreen)
    return screen


def fill(pilot: AppPilot, model: Path | str, tokens: int = 2048) -> None:
    one(pilot, "#reference", Input).value = str(model)
    one(pilot, "#tokens", Input).value = str(tokens)
    pilot.app.set_focus(None)


def test_a_probe_is_read_out_of_what_the_stage_says() -> None:
    note = "blk.3.attn_q.weight IQ3_S, Q4_K: error 0.013350, KLD 1.8e-03"
    assert probe_of(note) == ["blk.3.attn_q.weight", "IQ3_S, Q4_K", 0.01335, 0.0018]
    assert probe_of("errors of all types") is None


async def test_without_a_model_it_asks_for_one_and_a_wrong_one_is_said() -> None:
    async with running_app((100, 40)) as pilot:
        await to_make(pilot)
        pilot.app.set_focus(None)
        await pilot.press("m")
        await shows(pilot, "Name the model to quantize first.")
        fill(pilot, "/nowhere/x.gguf")
        await pilot.press("m")
        await shows(pilot, "/nowhere/x.gguf does not exist")


async def test_the_size_is_chosen_by_a_slider_of_presets() -> None:
    async with running_app() as pilot:
        await to_make(pilot)
        slider = one(pilot, "#budget", Slider)
        slider.focus()
        await pilot.press("home")
        await shows(pilot, f"as {LABELS[0]}")
        await pilot.press("right", "right")
        await shows(pilot, "as Q2_K")


@pytest.mark.native
async def test_a_curve_a_stop_and_a_quant_that_goes_on_from_there(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf", n_block=1)
    async with running_app((110, 50)) as pilot:
        screen = await to_make(pilot)
        fill(pilot, model)
        # The rest is what a tiny model has to show; rounding has tests of its own.
        one(pilot, "#feedback", Checkbox).value = False
        await pilot.press("v")
        probes = one(pilot, "#sensitivity", SensitivityMap)
        await wait_until(pilot, lambda: probes.slope(0, "attn_q.weight"), "a probe", 300)
        await pilot.press("ctrl+c")
        await shows(pilot, "stopped; m goes on here", 60)
        await pilot.press("v")
        await shows(pilot, "The curve is on the slider", 300)
        assert "KLD ~" in screen_text(pilot)
        await pilot.press("left")
        size = one(pilot, "#budget", Slider).value
        await pilot.press("m")
        await wait_until(pilot, lambda: screen.made is not None, "the file", 300)
        assert screen.made is not None
        header = read_header(Path(screen.made.file))
        assert header.file_bytes <= size
        await shows(pilot, "of the stock preset's KLD")
        assert Path(screen.made.report).is_file()
        await pilot.press("f2")
        await shows(pilot, Path(screen.made.file).stem)
