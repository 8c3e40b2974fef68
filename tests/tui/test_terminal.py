"""The app in a real terminal, with real keys, from a download to an answer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.commands import ARGV
from tests.hub_server import Hub, serving_here
from tests.tiny import write_tiny_llama
from tests.tui.tmux import Terminal, terminal

pytestmark = [pytest.mark.tui, pytest.mark.native, pytest.mark.e2e]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with the tiny model."""
    (tmp_path / "served").mkdir()
    with serving_here(monkeypatch, tmp_path) as served:
        served.models["o/tiny-GGUF"] = {"tiny-F16.gguf": write_tiny_llama(tmp_path / "served" / "tiny-F16.gguf")}
        yield served


def engines(shown: Terminal) -> list[psutil.Process]:
    """The app's llama-servers."""
    return [child for child in shown.children() if "llama-server" in child.name()]


def test_from_a_download_over_a_plan_to_answers_by_real_keys(hub: Hub, tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name.startswith(("HF_", "DYNRUN_", "PATH"))}
    env = {**kept, "HF_ENDPOINT": hub.url}
    with terminal(ARGV, tmp_path, env) as shown:
        shown.shows("demo-moe +built in")
        shown.keys("/")
        shown.type("tiny")
        shown.shows("tiny")
        shown.keys("Enter")
        shown.shows("o/tiny-GGUF +0")
        shown.keys("Enter")
        shown.shows("F16 +2.7 MB +1")
        shown.keys("d")
        shown.shows("━ done")
        shown.keys("p")
        shown.shows(r"in RAM at 2k of context: [\d.]+ tokens/s")
        shown.keys("Enter", "Right")
        shown.keys("c")
        shown.shows("context 0 of 2k")
        shown.type("Hello")
        shown.keys("Enter")
        first = shown.shows(r"tokens/s · context [1-9]")
        running = engines(shown)
        assert len(running) == 1
        shown.keys("C-c")
        shown.keys("C-r")
        shown.shows(r"tokens/s · context [1-9]")
        shown.keys("C-c")
        shown.keys("C-q")
        shown.shows("exit 0")
        assert "Hello" in first
        assert not running[0].is_running(), "no engine is left"
