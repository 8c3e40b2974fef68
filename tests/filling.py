"""Run `dynrun` in a process whose disk fills up at one moment of its own, however slow whoever watches it is.

`python -m tests.filling DISK PATTERN ARGUMENT…`: as soon as it says a line, or gives a file a name, that matches.
"""

from __future__ import annotations

import io
import re
import runpy
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def fill(disk: Path) -> None:
    """Take all the room that there is, whoever else is writing."""
    with (disk / "ballast").open("ab", buffering=0) as stream, suppress(OSError):
        while stream.write(bytes(1 << 16)):
            pass


class _Heard(io.FileIO):
    """Standard error, told to ``on_line`` once it is written."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        super().__init__(2, "wb", closefd=False)
        self.on_line = on_line

    def write(self, data: Any) -> int | None:
        done = super().write(data)
        for line in bytes(data).decode(errors="replace").splitlines():
            self.on_line(line)
        return done


def main(disk: Path, pattern: re.Pattern[str], arguments: list[str]) -> None:
    is_full = False

    def happens(what: str) -> None:
        nonlocal is_full
        if not is_full and pattern.search(what):
            is_full = True
            fill(disk)

    def audited(event: str, values: tuple[Any, ...]) -> None:
        if event == "os.rename":
            happens(str(values[1]))

    sys.stderr = io.TextIOWrapper(io.BufferedWriter(_Heard(happens)), encoding="utf-8", line_buffering=True)
    sys.addaudithook(audited)
    sys.argv = ["dynrun", *arguments]
    runpy.run_module("dynrun.cli.app", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), re.compile(sys.argv[2]), sys.argv[3:])
