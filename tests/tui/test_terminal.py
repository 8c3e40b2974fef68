"""The app in a real terminal, with real keys, from a download to a quant."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import ARGV
from tests.hub_server import Hub
from tests.tui.tmux import Terminal, begin_download, engines, order_small, terminal, variables

pytestmark = [pytest.mark.tui, pytest.mark.native, pytest.mark.e2e]


def test_from_a_download_over_a_plan_and_answers_to_a_quant_by_real_keys(hub: Hub, tmp_path: Path) -> None:
    with terminal(ARGV, tmp_path, variables(HF_ENDPOINT=hub.url)) as shown:
        download(shown)
        plan_and_chat(shown)
        (engine,) = engines(shown)
        make(shown)
        shown.keys("C-q")
        shown.shows("exit 0")
        assert not engine.is_running(), "no engine is left"


def download(shown: Terminal) -> None:
    begin_download(shown)
    shown.shows("━ done")


def plan_and_chat(shown: Terminal) -> None:
    shown.keys("p")
    shown.shows(r"in RAM at 2k of context: [\d.]+ tokens/s")
    shown.keys("Enter", "Right")
    shown.keys("c")
    shown.shows("context 0 of 2k")
    shown.type("Hello")
    shown.keys("Enter")
    assert "Hello" in shown.shows(r"tokens/s · context [1-9]")
    shown.keys("C-c")
    shown.keys("C-r")
    shown.shows(r"tokens/s · context [1-9]")
    shown.keys("C-c")


def make(shown: Terminal) -> None:
    """From the list of models, with settings that are soon done."""
    shown.keys("F2")
    shown.keys("Escape", "Escape")
    shown.shows("o/tiny-GGUF:F16 +F16|o/tiny-GGUF.* F16")
    shown.keys("Down", "Down", "m")
    shown.shows("reference +o/tiny-GGUF:F16")
    order_small(shown)
    shown.shows("▸ ")
    shown.shows("of the stock preset's KLD", 900)
    made = shown.shows(r"file\s+\S+")
    assert "predicted KLD" in made
