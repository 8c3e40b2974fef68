"""The Models room: the list, its filter, the details."""

from __future__ import annotations

from pathlib import Path

import pytest
from textual.widgets import DataTable, Input

from dynrun.models import resolve
from dynrun.paths import models_dir
from dynrun.tui.widgets.fitted_table import shortened
from dynrun.tui.widgets.model_table import ModelTable
from tests.tiny import write_tiny_llama
from tests.tui.driving import AppPilot, one, running_app, screen_text, shows, type_text, wait_until

pytestmark = pytest.mark.tui


def made(name: str) -> Path:
    """A tiny model where `make` puts its files."""
    path = models_dir() / "made" / f"{name}.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tiny_llama(path)


def listed(pilot: AppPilot) -> list[str]:
    table = one(pilot, "#local", ModelTable)
    return [str(table.get_row_at(row)[0]) for row in range(table.row_count)]


@pytest.mark.parametrize("size", [(80, 24), (200, 60)], ids=str)
async def test_models_are_listed_with_size_and_bpw_and_described(size: tuple[int, int]) -> None:
    path = made("alpha")
    async with running_app(size) as pilot:
        await wait_until(pilot, lambda: listed(pilot) == ["alpha", "demo", "demo-moe"], "the list")
        await shows(pilot, "16.06")
        await shows(pilot, "architecture  llama")
        await pilot.press("enter", "right")
        await shows(pilot, "token_embd.weight")
        await pilot.press("right")
        await shows(pilot, "{% for message in messages %}")
        await pilot.press("right")
        await shows(pilot, path.name)


async def test_details_follow_the_cursor_and_the_tabs_answer_to_clicks() -> None:
    made("alpha")
    async with running_app() as pilot:
        await wait_until(pilot, lambda: listed(pilot), "the list")
        await pilot.press("down")
        await shows(pilot, "comes with dynrun")
        await pilot.press("up")
        await shows(pilot, "architecture  llama")
        await pilot.click("ContentTab#--content-tab-files")
        await shows(pilot, "alpha.gguf")


async def test_words_filter_the_list_and_escape_ends_it() -> None:
    made("alpha")
    async with running_app() as pilot:
        await wait_until(pilot, lambda: len(listed(pilot)) == 3, "the list")
        await pilot.press("slash")
        await type_text(pilot, "moe de")
        await wait_until(pilot, lambda: listed(pilot) == ["demo-moe"], "the filter")
        await pilot.press("escape")
        await wait_until(pilot, lambda: len(listed(pilot)) == 3, "all of them")
        assert isinstance(pilot.app.focused, DataTable)


async def test_a_file_that_is_no_gguf_does_not_hide_the_others() -> None:
    made("alpha")
    (models_dir() / "made" / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    async with running_app() as pilot:
        await wait_until(pilot, lambda: listed(pilot) == ["alpha", "demo", "demo-moe"], "the list")


async def test_markup_in_a_name_is_text() -> None:
    made("[red]x[-]")
    async with running_app() as pilot:
        await wait_until(pilot, lambda: "[red]x[-]" in listed(pilot), "the list")
        assert "[red]x[-]" in screen_text(pilot)


async def test_every_listed_name_is_a_model_and_keys_carry_it_to_other_rooms() -> None:
    path = made("alpha")
    assert resolve("alpha").path == path
    async with running_app() as pilot:
        await wait_until(pilot, lambda: listed(pilot), "the list")
        await pilot.press("p")
        await shows(pilot, "tokens/s")
        assert "alpha" in screen_text(pilot)
        await pilot.press("b")
        await shows(pilot, "as planned")
        assert one(pilot, "#models", Input).value == "alpha"


def test_long_names_lose_their_middle() -> None:
    name = "unsloth/Llama-4-Scout-17B-16E-Instruct-GGUF:UD-IQ2_XXS"
    assert shortened(name, 30) == "unsloth/Ll…uct-GGUF:UD-IQ2_XXS"
    assert shortened("demo", 30) == "demo"
