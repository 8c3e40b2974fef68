"""A program ends when dynrun does, however dynrun ends: kill -9 included.

Linux does it itself for a child of the main thread (prctl(2), PR_SET_PDEATHSIG); the signal follows the *thread* that
started the child, so elsewhere, and for children of other threads, a shell holds the end of a pipe that only dynrun
keeps open, and kills the child's group once it closes. Standard library only: build.py imports this.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# Reads to the end of the pipe, unless told that all is well.
_SCRIPT = 'read -r word; [ "$word" = over ] || kill -KILL "$0" 2>/dev/null'
# Looked up before any fork: nothing may be imported between fork and exec.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def dies_by_itself() -> bool:
    """Whether a child started now, by this thread, is ended by the system."""
    return _PRCTL is not None and threading.current_thread() is threading.main_thread()


def before_exec() -> Callable[[], None] | None:
    """What a child must do between fork and exec: one system call, safe beside other threads."""
    return _die_with_parent if dies_by_itself() else None


def _die_with_parent() -> None:
    if _PRCTL is not None:
        _PRCTL(1, signal.SIGKILL, 0, 0, 0)


@contextmanager
def guarded(child: subprocess.Popen[str], end: Callable[[subprocess.Popen[str]], None]) -> Iterator[None]:
    """Have ``child``, and its group where it leads one, killed if this process ends inside the block; ``end`` it
    when the block is left. Raises OSError where the watchdog cannot be started; the child has been ended then."""
    watchdog = None
    try:
        # Without process groups (Windows) there is no shell either.
        if not dies_by_itself() and hasattr(os, "killpg"):
            watchdog = _watchdog(child)
        yield
    finally:
        end(child)
        if watchdog is not None:
            # Closes the pipe and waits.
            with suppress(OSError):
                watchdog.communicate("over\n")


def _watchdog(child: subprocess.Popen[str]) -> subprocess.Popen[str]:
    leads = False
    with suppress(OSError):
        leads = os.getpgid(child.pid) == child.pid
    # The reading end of the pipe is the shell's; the writing end is inherited by nobody.
    return subprocess.Popen(
        ["/bin/sh", "-c", _SCRIPT, f"-{child.pid}" if leads else str(child.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
