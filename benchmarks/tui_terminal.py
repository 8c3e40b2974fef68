"""A program on a pseudo-terminal, for tui.py and tui_chat.py: what it wrote and when, keys to it, what it used."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from resource import struct_rusage

LONGEST_S = 60.0


class Terminal:
    """Reads in a thread of its own, so that the program never waits for whoever measures it."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], size: tuple[int, int]) -> None:
        self.began_s, self.ended = time.perf_counter(), False
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            named = {**os.environ, **env, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
            os.execve(argv[0], list(argv), named)  # noqa: S606
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        self._seen = bytearray()
        # Where each piece that was read ends, and when it came.
        self._pieces: list[tuple[int, float]] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 1 << 16)
            except OSError:
                return
            if not data:
                return
            with self._changed:
                self._seen += data
                self._pieces.append((len(self._seen), time.perf_counter()))
                self._changed.notify_all()

    @property
    def mark(self) -> int:
        """How many bytes have come, for ``after``."""
        return len(self._seen)

    def send(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def until(self, pattern: str, after: int = 0) -> float:
        """When ``pattern`` had come, behind the first ``after`` bytes; as perf_counter gives it."""
        sought, deadline = re.compile(pattern.encode()), time.perf_counter() + LONGEST_S
        with self._changed:
            while (found := sought.search(self._seen, after)) is None:
                if not self._changed.wait(deadline - time.perf_counter()):
                    last = bytes(self._seen[-2000:])
                    raise SystemExit(f"no {pattern!r} within {LONGEST_S:.0f} s; the terminal got:\n{last!r}")
            return next(when for upto, when in self._pieces if upto >= found.end())

    def end(self) -> struct_rusage:
        """Kill it; what it used."""
        self.ended = True
        os.kill(self.pid, signal.SIGKILL)
        _, _, used = os.wait4(self.pid, 0)
        os.close(self._master)
        return used


@contextmanager
def terminal(
    argv: Sequence[str], env: Mapping[str, str] | None = None, size: tuple[int, int] = (80, 24)
) -> Iterator[Terminal]:
    """``argv`` on a terminal; killed at the end."""
    shown = Terminal(argv, env or {}, size)
    try:
        yield shown
    finally:
        if not shown.ended:
            shown.end()


def python(*arguments: str) -> list[str]:
    """This interpreter with ``arguments``."""
    return [sys.executable, *arguments]
