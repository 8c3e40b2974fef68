"""Run `dynrun` in a process that something befalls at a moment of its own, however slow whoever watches it is.

`python -m tests.disturbed WHAT PATTERN ARGUMENT…`, with ``WHAT`` ``fill:FOLDER`` (its disk is full from the first
moment on) or ``kill:N`` (SIGKILL at the N-th one). A moment is when it has said a line, or is about to write or rename
a file, that matches.
"""

from __future__ import annotations

import io
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any


def disturbed(what: str, pattern: str) -> tuple[str, ...]:
    """The program that `dynrun` is run by (tests/commands.py)."""
    return sys.executable, "-m", "tests.disturbed", what, pattern


def fill(disk: Path) -> None:
    """Take all the room that there is, whoever else is writing."""
    with (disk / "ballast").open("ab", buffering=0) as stream, suppress(OSError):
        while stream.write(bytes(1 << 16)):
            pass


class _Heard(io.FileIO):
    """Standard error, whose lines ``on_line`` is told once they are written."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        super().__init__(2, "wb", closefd=False)
        self.on_line = on_line

    def write(self, data: Any) -> int | None:
        done = super().write(data)
        for line in bytes(data).decode(errors="replace").splitlines():
            self.on_line(line)
        return done


def written(event: str, values: tuple[Any, ...]) -> Iterator[str]:
    """The file that an audit event says is opened for writing, or is given its name."""
    if event == "os.rename":
        yield str(values[1])
    if event == "open" and values[2] & (os.O_WRONLY | os.O_RDWR) and not isinstance(values[0], int):
        yield str(values[0])


def main(what: str, pattern: re.Pattern[str], arguments: list[str]) -> None:
    kind, _, value = what.partition(":")
    moments = 0

    def happens(text: str) -> None:
        nonlocal moments
        if not pattern.search(text):
            return
        moments += 1
        if kind == "kill" and moments == int(value):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "fill" and moments == 1:
            fill(Path(value))

    def audited(event: str, values: tuple[Any, ...]) -> None:
        for path in written(event, values):
            happens(path)

    sys.stderr = io.TextIOWrapper(io.BufferedWriter(_Heard(happens)), encoding="utf-8", line_buffering=True)
    sys.addaudithook(audited)
    sys.argv = ["dynrun", *arguments]
    runpy.run_module("dynrun.cli.app", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1], re.compile(sys.argv[2]), sys.argv[3:])
