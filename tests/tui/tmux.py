"""A real terminal for the app: tmux with a server of its own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest


@dataclass(frozen=True)
class Terminal:
    """``socket``: of the tmux server; ``folder``: where screens are kept, one file a step."""

    socket: Path
    folder: Path

    def keys(self, *names: str) -> None:
        """Keys as tmux calls them: ``Enter``, ``C-q``, ``F3``."""
        self._tmux("send-keys", *names)

    def type(self, text: str) -> None:
        """Text, letter by letter."""
        self._tmux("send-keys", "-l", text)

    def screen(self) -> str:
        """What stands on it."""
        return self._tmux("capture-pane", "-p")

    def shows(self, pattern: str, timeout_s: float = 120.0) -> str:
        """The screen once ``pattern`` stands on it; it is kept."""
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, text := self.screen()):
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {timeout_s} s for {pattern!r}; the screen:\n{text}")
            time.sleep(0.1)
        number = len(list(self.folder.iterdir()))
        (self.folder / f"{number:02}.txt").write_text(f"{pattern}\n{text}", encoding="utf-8")
        return text

    def until(self, condition: Callable[[], object], what: str, timeout_s: float = 120.0) -> None:
        """Until ``condition`` holds, of something beside the screen."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}; the screen:\n{self.screen()}"
            time.sleep(0.1)

    def cursor_on(self, pattern: str, timeout_s: float = 60.0) -> None:
        """Until the cursor stands in a line with ``pattern``: letters go to what has the focus when they are read."""
        self.until(lambda: re.search(pattern, self._cursor_line()), f"the cursor where {pattern!r} stands", timeout_s)

    def _cursor_line(self) -> str:
        row = int(self._tmux("display-message", "-p", "#{cursor_y}"))
        return self.screen().splitlines()[row]

    def children(self) -> list[psutil.Process]:
        """All processes below the shell of the terminal."""
        return psutil.Process(int(self._tmux("list-panes", "-F", "#{pane_pid}"))).children(recursive=True)

    def _tmux(self, *arguments: str) -> str:
        argv = ["tmux", "-S", str(self.socket), *arguments]
        # The size is the terminal's, not that of the one in which the tests run.
        env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "TMUX")}
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30, env=env).stdout


def variables(**more: str) -> dict[str, str]:
    """The environment of a program under test in a terminal of its own."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(("HF_", "DYNRUN_", "PATH"))}
    return {**kept, **more}


@contextmanager
def terminal(
    argv: Sequence[str], folder: Path, env: Mapping[str, str], size: tuple[int, int] = (100, 30)
) -> Iterator[Terminal]:
    """``argv`` in a terminal. What it prints last stays, with its exit code: ``exit 0``."""
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    screens = folder / "screens"
    screens.mkdir(parents=True)
    # Not in the test's folder: the path of a socket may have a hundred characters.
    with tempfile.TemporaryDirectory(prefix="tmux-", dir="/tmp") as short:
        shown = Terminal(Path(short) / "s", screens)
        command = f"{shlex.join(argv)}; echo exit $?; exec sleep 600"
        variables = [part for name, value in env.items() for part in ("-e", f"{name}={value}")]
        width, height = map(str, size)
        start = ["-f", os.devnull, "new-session", "-d", "-x", width, "-y", height, *variables, command]
        shown._tmux(*start)
        try:
            yield shown
        finally:
            shown._tmux("kill-server")


def engines(shown: Terminal) -> list[psutil.Process]:
    """The app's llama-servers."""
    return [child for child in shown.children() if "llama-server" in child.name()]


def order_small(shown: Terminal) -> None:
    """In the Make room: few tokens, no error feedback, and go."""
    shown.shows(r"reference +(\S*tiny|/)")
    shown.keys("Tab", "Tab", "Tab", "Tab")
    shown.cursor_on("tokens +32768")
    shown.keys("C-u")
    shown.shows(r"tokens *\n")
    shown.type("2048")
    shown.shows("tokens +2048")
    shown.keys("Tab")
    shown.shows("m Make")
    shown.keys("Space", "m")


def begin_download(shown: Terminal) -> None:
    """In the Models room: search the Hub of the fixture ``hub`` for its model, and ask for it."""
    shown.shows("demo-moe +built in")
    shown.keys("/")
    shown.type("tiny")
    shown.shows("tiny")
    shown.keys("Enter")
    shown.shows("o/tiny-GGUF +0")
    shown.keys("Enter")
    shown.shows("F16 +2.7 MB +1")
    shown.keys("d")
