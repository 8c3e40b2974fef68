"""kill -9 of the app's engine, and of the app, in a real terminal: nothing is lost, and it goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest

from dynrun.hub.part import NOTE_SUFFIX
from dynrun.runtime.history import list_chats
from dynrun.tui.unfinished import unfinished
from tests.commands import ARGV
from tests.hub_server import Fault, Hub
from tests.tiny import write_tiny_llama
from tests.tui.tmux import Terminal, begin_download, engines, order_small, terminal, variables

_QUESTION = "Write a long story about a llama, of at least one thousand words, with every detail."
_START_CPU_S = 2.0
pytestmark = [pytest.mark.tui, pytest.mark.native, pytest.mark.e2e]


def engine_of(shown: Terminal) -> psutil.Process:
    """The one that it has."""
    (engine,) = engines(shown)
    return engine


def child(shown: Terminal, word: str) -> psutil.Process:
    """The process below the terminal whose command has ``word``."""
    return next(one for one in shown.children() if any(word in part for part in one.cmdline()))


def test_of_the_engine_during_an_answer(demo_model: Path, tmp_path: Path) -> None:
    with terminal([*ARGV, "tui", str(demo_model), "--room", "chat"], tmp_path, variables()) as shown:
        shown.shows(r"context 0 of \d+k")
        shown.type(_QUESTION)
        shown.keys("Enter")
        shown.shows(r"tokens/s · context [1-9]")
        engine = engine_of(shown)
        engine.kill()
        # It is taken for the system's, which kills what needs too much memory: the app starts another with less.
        shown.until(lambda: [one for one in engines(shown) if one.pid != engine.pid], "another engine")
        # What stands on the screen may be of the first one still: this much is more than a start takes.
        shown.until(lambda: sum(one.cpu_times().user for one in engines(shown)) > _START_CPU_S, "its answer")
        shown.shows(r"tokens/s · context [1-9]")
        # A small model may have come to an end by itself.
        shown.keys("C-c")
        shown.shows(r"stopped · |\d tokens, ")
        shown.keys("C-q")
        shown.shows("exit 0")
    question, answer = list_chats()[0].messages
    assert question.text == _QUESTION
    assert answer.text
    assert answer.stop in ("cancelled", "end")


def test_of_the_app_during_a_download(hub: Hub, tmp_path: Path) -> None:
    hub.fault = lambda path, start, end: Fault("stall", after=500_000)
    env = variables(HF_ENDPOINT=hub.url)
    with terminal([*ARGV, "tui"], tmp_path / "first", env) as shown:
        begin_download(shown)
        shown.shows(r" [1-9]\d?%  [\d.]+ .B of 2.7 MB")
        # A killed download loses the last moment: what is not noted yet.
        notes = Path(os.environ["HF_HOME"])
        shown.until(lambda: any(noted(path) for path in notes.rglob(f"*{NOTE_SUFFIX}")), "the note of what has come")
        child(shown, "dynrun").kill()
        shown.shows("exit 137")
    assert unfinished() == ["o/tiny-GGUF:F16"]
    hub.fault = lambda path, start, end: None
    hub.served.clear()
    with terminal([*ARGV, "tui"], tmp_path / "second", env) as shown:
        shown.shows("o/tiny-GGUF:F16 .*paused; Space goes on")
        # Over the field of the search to the last of all.
        shown.keys("BTab", "BTab")
        shown.shows("Pause or go on")
        shown.keys("Space")
        shown.shows("━ done")
        shown.keys("C-q")
        shown.shows("exit 0")
    sent = sum(served.sent for served in hub.served if served.path == "tiny-F16.gguf")
    assert sent < (tmp_path / "served" / "tiny-F16.gguf").stat().st_size, "what had come was not sent again"
    assert unfinished() == []


def noted(note: Path) -> bool:
    """Whether it names any bytes."""
    return bool(json.loads(note.read_text(encoding="utf-8"))["done"])


def test_of_the_app_during_a_make(tmp_path: Path, private_cache: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf", n_block=1)
    command = [*ARGV, "tui", str(model), "--room", "make"]
    with terminal(command, tmp_path / "first", variables()) as shown:
        order_small(shown)
        shown.shows(r"▸ sensitivity +[\d:]+( s)? +━")
        worker = child(shown, "make_worker")
        child(shown, "dynrun.cli.app").kill()
        shown.shows("exit 137")
        _, alive = psutil.wait_procs([worker], timeout=30)
        assert not alive, "its children die with it"
    done = manifests(private_cache, "imatrix")
    assert done
    with terminal(command, tmp_path / "second", variables()) as shown:
        order_small(shown)
        shown.shows("of the stock preset's KLD", 900)
        shown.keys("C-q")
        shown.shows("exit 0")
    assert manifests(private_cache, "imatrix") == done, "what was done is not done again"


def manifests(cache: Path, stage: str) -> dict[str, int]:
    """The results of a stage that are whole, with when they were written."""
    found = (cache / "stages" / stage).glob("*/manifest.json")
    return {str(path): path.stat().st_mtime_ns for path in found if json.loads(path.read_text(encoding="utf-8"))}
