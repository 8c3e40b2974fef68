"""The Models room and the Hub: search, quants, downloads that pause, go on, fail, are cancelled; deletion."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynrun.hub.cache import cache_folder
from dynrun.tui.unfinished import unfinished
from dynrun.tui.widgets.download_row import DownloadRow
from dynrun.tui.widgets.hit_table import HitTable
from dynrun.tui.widgets.model_table import ModelTable
from tests.hub_server import Fault, Hub, serving_here
from tests.tiny import write_tiny_llama
from tests.tui.driving import AppPilot, one, running_app, screen_text, shows, type_text, wait_until

pytestmark = pytest.mark.tui

NAME = "o/tiny-GGUF"
QUANT = f"{NAME}:F16"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with two repositories; the tiny model in one of them as one quant."""
    folder = tmp_path / "served"
    folder.mkdir()
    with serving_here(monkeypatch, tmp_path) as served:
        tiny = write_tiny_llama(folder / "tiny-F16.gguf").read_bytes()
        served.models[NAME] = {"tiny-F16.gguf": tiny, "tiny-Q8_0.gguf": b"GGUF" + tiny[4:-1], "README.md": b"# tiny"}
        served.models["o/other-GGUF"] = {"other-Q4_K_M.gguf": b"GGUF" * 99}
        yield served


async def search(pilot: AppPilot, words: str = "tiny") -> None:
    await pilot.press("slash")
    await type_text(pilot, words)
    await pilot.press("enter")


async def open_repository(pilot: AppPilot) -> None:
    await search(pilot)
    await wait_until(pilot, lambda: one(pilot, "#hits", HitTable).row_count == 1, "the hits")
    await pilot.press("enter")
    await shows(pilot, "Q8_0")


def row(pilot: AppPilot) -> DownloadRow:
    found: DownloadRow = one(pilot, "DownloadRow", DownloadRow)
    return found


async def test_search_open_download_and_find_it_in_the_list(hub: Hub) -> None:
    async with running_app((100, 30)) as pilot:
        await open_repository(pilot)
        await pilot.press("down", "d")
        await wait_until(pilot, lambda: row(pilot).state == "done", "the download")
        assert unfinished() == []
        await pilot.press("escape", "escape")
        await shows(pilot, QUANT)
        await wait_until(pilot, lambda: one(pilot, "#local", ModelTable).row_count == 3, "the list")


async def test_a_download_pauses_by_space_and_goes_on_by_space(hub: Hub) -> None:
    stalled = threading.Event()

    def fault(path: str, start: int, end: int) -> Fault | None:
        if stalled.is_set():
            return None
        return Fault("stall", after=100_000)

    hub.fault = fault
    async with running_app((100, 30)) as pilot:
        await open_repository(pilot)
        await pilot.press("down", "d")
        await wait_until(pilot, lambda: row(pilot).done_bytes >= 100_000, "some bytes")
        assert "↓" in screen_text(pilot).splitlines()[0]
        row(pilot).focus()
        await pilot.press("space")
        await wait_until(pilot, lambda: row(pilot).state == "paused", "the pause")
        await shows(pilot, "paused")
        assert unfinished() == [QUANT]
        stalled.set()
        await pilot.press("space")
        await wait_until(pilot, lambda: row(pilot).state == "done", "the rest")
        sent = sum(served.sent for served in hub.served if served.path == "tiny-F16.gguf")
        assert sent < 1.2 * len(hub.models[NAME]["tiny-F16.gguf"])


async def test_what_a_killed_app_was_downloading_is_offered_again_and_goes_on(hub: Hub) -> None:
    hub.fault = lambda path, start, end: Fault("stall", after=50_000)
    async with running_app((100, 30)) as pilot:
        await open_repository(pilot)
        await pilot.press("down", "d")
        await wait_until(pilot, lambda: row(pilot).done_bytes >= 50_000, "some bytes")
    # As after a kill: nobody has paused it.
    hub.fault = lambda path, start, end: None
    async with running_app((100, 30)) as pilot:
        await shows(pilot, "paused; Space goes on")
        row(pilot).focus()
        await pilot.press("space")
        await wait_until(pilot, lambda: row(pilot).state == "done", "the rest")


async def test_cancel_frees_what_has_come(hub: Hub) -> None:
    hub.fault = lambda path, start, end: Fault("stall", after=100_000)
    async with running_app((100, 30)) as pilot:
        await open_repository(pilot)
        await pilot.press("down", "d")
        await wait_until(pilot, lambda: row(pilot).done_bytes >= 100_000, "some bytes")
        row(pilot).focus()
        await pilot.press("x")
        await wait_until(pilot, lambda: not list(cache_folder().rglob("*.incomplete")), "the parts to go")
        assert unfinished() == []
        assert not pilot.app.screen.query(DownloadRow)


async def test_ctrl_c_pauses_downloads_and_does_not_quit(hub: Hub) -> None:
    hub.fault = lambda path, start, end: Fault("stall", after=100_000)
    async with running_app((100, 30)) as pilot:
        await open_repository(pilot)
        await pilot.press("down", "d")
        await wait_until(pilot, lambda: row(pilot).state == "running", "the download")
        await pilot.press("ctrl+c")
        await wait_until(pilot, lambda: row(pilot).state == "paused", "the pause")
        assert pilot.app.is_running


async def test_a_failed_download_says_why(hub: Hub) -> None:
    hub.gated.add(NAME)
    async with running_app((100, 30)) as pilot:
        await open_repository(pilot)
        await pilot.press("down", "d")
        await wait_until(pilot, lambda: row(pilot).state == "failed", "the failure")
        await shows(pilot, "is gated")


async def test_a_search_without_hits_and_a_hub_that_is_away_are_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_app((100, 30)) as pilot:
        await search(pilot, "nosuch")
        await shows(pilot, "the Hub finds no GGUF for nosuch")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    async with running_app((100, 30)) as pilot:
        await search(pilot, "tiny")
        await shows(pilot, "HF_HUB_OFFLINE")


async def test_deletion_asks_first_and_says_what_it_frees(hub: Hub) -> None:
    async with running_app((100, 30)) as pilot:
        await open_repository(pilot)
        await pilot.press("down", "d")
        await wait_until(pilot, lambda: row(pilot).state == "done", "the download")
        await pilot.press("escape", "escape")
        await wait_until(pilot, lambda: one(pilot, "#local", ModelTable).row_count == 3, "the list")
        one(pilot, "#local", ModelTable).move_cursor(row=2)
        await pilot.press("delete")
        await shows(pilot, f"Delete {QUANT}? It frees 2.7 MB.")
        await pilot.press("n")
        await wait_until(pilot, lambda: not pilot.app.screen.is_modal, "the answer")
        assert one(pilot, "#local", ModelTable).row_count == 3
        await pilot.press("delete")
        await shows(pilot, "Delete")
        await pilot.press("y")
        await wait_until(pilot, lambda: one(pilot, "#local", ModelTable).row_count == 2, "the deletion")
        assert not list(cache_folder().rglob("tiny-F16.gguf"))


async def test_quants_of_a_repository_are_planned_before_download(hub: Hub) -> None:
    async with running_app((100, 40)) as pilot:
        await open_repository(pilot)
        await pilot.press("p")
        await shows(pilot, "F16 ★")
        await shows(pilot, "tokens/s")
        await pilot.press("up")
        await shows(pilot, "is truncated")
        await pilot.press("down")
        await pilot.press("d")
        await wait_until(pilot, lambda: pilot.app.current_mode == "models", "the way to Models")
        await wait_until(pilot, lambda: row(pilot).state == "done", "the download")
