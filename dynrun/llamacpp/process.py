"""One way to run a program: live, captured or streamed; it never outlives the call that started it.

Takes an argument list, gives a :class:`Completed`; raises :class:`ToolError` with everything a person needs to see
what went wrong. Does not know any tool. Standard library only: build.py imports this.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dynrun.artifacts import translated_os_errors
from dynrun.errors import DynrunError
from dynrun.llamacpp import watchdog
from dynrun.paths import logs_dir

_TAIL_LINES = 40
_GRACE_S = 5.0
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
# Settings of llama.cpp that a user's shell may hold for other purposes, and secrets that no child needs.
_SCRUBBED_PREFIXES = ("LLAMA_", "GGML_")
_SCRUBBED = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"})

_DEFAULTS = {
    # Idle threads sleep instead of spinning, as in the engine (library.py).
    "OMP_WAIT_POLICY": "passive",
    # An abort must not start a debugger on the dying process.
    "GGML_NO_BACKTRACE": "1",
}

OnLine = Callable[[str], None]


@dataclass(frozen=True)
class Completed:
    """A finished program. ``stdout`` is whole, ``stderr_tail`` its last lines, ``log`` holds everything."""

    argv: tuple[str, ...]
    exit_code: int
    stdout: str
    stderr_tail: tuple[str, ...]
    log: Path | None
    elapsed_s: float


class ToolError(DynrunError):
    """A program failed: ``argv``, ``tool_exit_code``, the last lines of its stderr, and its log."""

    def __init__(self, message: str, completed: Completed, *, fix: str = "") -> None:
        super().__init__(message, fix=fix, log=completed.log)
        self.argv = completed.argv
        self.tool_exit_code = completed.exit_code
        self.stderr_tail = completed.stderr_tail


def exit_reason(exit_code: int) -> str:
    """``exit code 3``, or ``signal SIGKILL`` for a negative code, as subprocess gives it."""
    if exit_code < 0:
        with suppress(ValueError):
            return f"signal {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


def new_log(name: str) -> Path:
    """A new log file's path; its folder is there afterwards."""
    folder = logs_dir()
    with translated_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{name}.log"


def scrubbed_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for llama.cpp's programs: no stray settings, no secrets, plus ``extra``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_SCRUBBED_PREFIXES) and k not in _SCRUBBED}
    return _DEFAULTS | kept | dict(extra or {})


def live(argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
    """Run with the terminal as it is. Raises ToolError on failure."""
    started = time.monotonic()
    with spawned(argv, env=env, cwd=cwd) as child:
        exit_code = child.wait()
    done = Completed(_strings(argv), exit_code, "", (), None, time.monotonic() - started)
    if exit_code:
        raise ToolError(f"{_name(argv)} failed with {exit_reason(exit_code)}", done)


def capture(
    argv: Sequence[str | Path],
    *,
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = True,
    cancel: threading.Event | None = None,
) -> Completed:
    """Run and keep the output. Raises ToolError on failure unless ``check`` is false."""
    return stream(argv, lambda _: None, log=log, env=env, cwd=cwd, check=check, cancel=cancel)


def stream(
    argv: Sequence[str | Path],
    on_line: OnLine,
    *,
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = True,
    cancel: threading.Event | None = None,
) -> Completed:
    """Run and give each line of both outputs to ``on_line`` as it comes (from reader threads).

    ``cancel``, once set, ends the program; ToolError says so. An exception raised here, Ctrl+C and those of ``on_line``
    included, ends it too.
    """
    started = time.monotonic()
    out: list[str] = []
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    failures: list[Exception] = []
    with _log_stream(log, argv) as sink, spawned(argv, env=env, cwd=cwd, pipes=True) as child:
        readers = [
            threading.Thread(target=_read, args=(child, pipe, (keep, sink, on_line), failures), daemon=True)
            for pipe, keep in ((child.stdout, out.append), (child.stderr, tail.append))
        ]
        for reader in readers:
            reader.start()
        exit_code = _wait(child, cancel)
        # What it left running holds the pipes open.
        terminate(child)
        for reader in readers:
            reader.join()
    if failures:
        raise failures[0]
    done = Completed(_strings(argv), exit_code, "".join(out), tuple(tail), log, time.monotonic() - started)
    if cancel is not None and cancel.is_set():
        raise ToolError(f"{_name(argv)} was cancelled", done)
    if check and exit_code:
        telling = next((line.strip() for line in reversed(tail) if line.strip()), "it gave no reason")
        raise ToolError(f"{_name(argv)} failed with {exit_reason(exit_code)}: {telling[:300]}", done)
    return done


@contextmanager
def spawned(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pipes: bool = False,
    stderr: IO[bytes] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A running program in a process group of its own; on leaving, it and all its children are ended.

    With ``pipes`` both outputs are text pipes; with ``stderr`` both go to that file. Without either it keeps the
    terminal and dynrun's own group, so that Ctrl+C reaches it. It does not outlive dynrun, however that ends.
    """
    piped = subprocess.PIPE if pipes else None
    try:
        child = subprocess.Popen(
            _strings(argv),
            env=None if env is None else dict(env),
            cwd=cwd,
            stdin=None if piped is None and stderr is None else subprocess.DEVNULL,
            stdout=stderr if stderr is not None else piped,
            stderr=stderr if stderr is not None else piped,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=piped is not None or stderr is not None,
            preexec_fn=watchdog.before_exec(),  # noqa: PLW1509
        )
    except OSError as error:
        raise DynrunError(f"cannot start {argv[0]}: {error.strerror}", fix="run python3 build.py") from error
    with watchdog.guarded(child, terminate):
        yield child


def terminate(child: subprocess.Popen[str]) -> None:
    """End a program and its process group: politely, then by force."""
    for number in (signal.SIGTERM, _KILL):
        if child.poll() is not None and number == signal.SIGTERM:
            break
        _signal_group(child, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=_GRACE_S)
            break
    # A group may outlive its leader: what the leader left behind goes too.
    if hasattr(os, "killpg"):
        with suppress(OSError):
            os.killpg(child.pid, _KILL)


def _signal_group(child: subprocess.Popen[str], number: int) -> None:
    with suppress(OSError):
        if hasattr(os, "killpg") and os.getpgid(child.pid) == child.pid:
            os.killpg(child.pid, number)
        else:
            child.send_signal(number)


def _wait(child: subprocess.Popen[str], cancel: threading.Event | None) -> int:
    if cancel is None:
        return child.wait()
    while child.poll() is None:
        if cancel.wait(0.1):
            terminate(child)
    return child.wait()


def _read(
    child: subprocess.Popen[str], pipe: IO[str] | None, consumers: tuple[OnLine, ...], failures: list[Exception]
) -> None:
    assert pipe is not None
    with pipe:
        try:
            for line in pipe:
                for consume in consumers:
                    consume(line)
        except Exception as error:
            failures.append(error)
            _signal_group(child, _KILL)


@contextmanager
def _log_stream(log: Path | None, argv: Sequence[str | Path]) -> Iterator[OnLine]:
    if log is None:
        yield lambda _: None
        return
    lock = threading.Lock()
    with translated_os_errors(log), log.open("a", encoding="utf-8") as stream:
        stream.write("$ " + " ".join(_strings(argv)) + "\n")

        def write(line: str) -> None:
            # A full disk must not block the program whose pipe we empty.
            with lock, suppress(OSError, ValueError):
                stream.write(line)
                stream.flush()

        yield write


def _strings(argv: Sequence[str | Path]) -> tuple[str, ...]:
    return tuple(str(part) for part in argv)


def _name(argv: Sequence[str | Path]) -> str:
    return Path(argv[0]).name
