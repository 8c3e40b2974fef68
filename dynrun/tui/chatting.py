"""The engine of the Chat room, driven from worker threads: it tells what happens in frozen messages.

An :class:`Engine` is one model and its session (runtime/session.py). Pieces of an answer are put together for a
tenth of a second: each time that an answer grows the whole screen is laid out and drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, RLock, Timer
from typing import TYPE_CHECKING, Any

from dynrun.errors import DynrunError
from dynrun.tui.jobs import Job
from dynrun.tui.messages import Frozen

if TYPE_CHECKING:
    from dynrun.runtime.events import Answer, Event
    from dynrun.runtime.history import Message
    from dynrun.runtime.ladder import Planner
    from dynrun.runtime.placement import Placement
    from dynrun.runtime.sampling import Sampling
    from dynrun.runtime.session import Session

_FLUSH_S = 0.1
_LOG_LINES = 8


@dataclass(eq=False)
class EngineNote(Frozen):
    """What the engine is doing, in a few words; empty when it is done."""

    text: str


@dataclass(eq=False)
class EngineReady(Frozen):
    """The model answers. ``metadata``: the header's, for what it recommends; ``vision``: it takes images."""

    model: str
    n_ctx: int
    metadata: dict[str, Any]
    vision: bool


@dataclass(eq=False)
class AnswerGrew(Frozen):
    """More of the answer; ``restarted``: what came before is void. ``n_tokens`` so far, ``n_per_second`` of late."""

    text: str
    thought: str
    n_tokens: int
    n_per_second: float
    restarted: bool = False


@dataclass(eq=False)
class AnswerEnded(Frozen):
    """The answer is whole, or was stopped."""

    answer: Answer


@dataclass(eq=False)
class EngineFailed(Frozen):
    """The engine died, or could not start. ``lines``: the last of its log; ``partial``: of the answer, what came."""

    reason: str
    fix: str
    lines: tuple[str, ...] = ()
    log: Path | None = None
    partial: str = ""


class _Pieces:
    """Text and thoughts on their way to the screen; none waits there longer than _FLUSH_S, even if no more comes."""

    def __init__(self, tell: Callable[[AnswerGrew], None]) -> None:
        self._tell = tell
        self.whole: list[str] = []
        self._text: list[str] = []
        self._thought: list[str] = []
        self._n_tokens, self._restarted = 0, False
        self._began_s = self._flushed_s = 0.0
        self._lock, self._timer = RLock(), Timer(0, self.flush)

    def add(self, text: str, thought: str) -> None:
        with self._lock:
            now = time.monotonic()
            if not self._n_tokens:
                self._began_s = now
            self._n_tokens += 1
            self._text.append(text)
            self._thought.append(thought)
            self.whole.append(text)
            if (left := self._flushed_s + _FLUSH_S - now) <= 0:
                self.flush()
            elif not self._timer.is_alive():
                self._timer = Timer(left, self.flush)
                self._timer.daemon = True
                self._timer.start()

    def restart(self) -> None:
        with self._lock:
            self._n_tokens, self._restarted = 0, True
            for kept in (self._text, self._thought, self.whole):
                kept.clear()

    def flush(self) -> None:
        with self._lock:
            text, thought = "".join(self._text), "".join(self._thought)
            if text or thought or self._restarted:
                spent = time.monotonic() - self._began_s
                speed = (self._n_tokens - 1) / spent if self._n_tokens > 1 and spent > 0 else 0.0
                self._tell(AnswerGrew(text, thought, self._n_tokens, speed, self._restarted))
            self._text.clear()
            self._thought.clear()
            self._restarted, self._flushed_s = False, time.monotonic()


class Engine:
    """One model for the Chat room: opened once, asked one question at a time, cancelled from anywhere."""

    def __init__(self, model: str, placement: Placement | None = None) -> None:
        self.model, self.placement = model, placement
        self.path: Path | None = None
        self._session: Session | None = None
        self._busy = Lock()
        self._closed = False

    def start(self, job: Job) -> None:
        """Have the model answer; the app is told so, or why not."""
        try:
            with self._busy:
                self._started(job)
        except DynrunError as error:
            job.post(failed(error))

    def ask(self, job: Job, messages: Sequence[Message], system: str, sampling: Sampling) -> None:
        """One answer; the app is told of each piece, and of its end."""
        pieces = _Pieces(job.post)
        try:
            with self._busy:
                session = self._started(job)
                for event in session.ask(messages, system=system, sampling=sampling):
                    _told(job, pieces, event)
        except DynrunError as error:
            pieces.flush()
            job.post(failed(error, "".join(pieces.whole)))

    def cancel(self) -> None:
        """End the answer, or the start, that is going on."""
        if self._session is not None:
            self._session.cancel()

    def close(self) -> None:
        """End the engine's child process, whatever it does."""
        self._closed = True
        self.cancel()
        with self._busy:
            if self._session is not None:
                self._session.close()

    def _started(self, job: Job) -> Session:
        from dynrun.runtime.events import Ready

        if self._closed:
            raise DynrunError("the model was closed meanwhile", fix="ask again")
        if self._session is None:
            job.post(EngineNote(f"opening {self.model}"))
            self._session = self._opened()
        for event in self._session.start():
            job.post(EngineNote(note(event)))
            if isinstance(event, Ready):
                job.post(self._ready(event.n_ctx))
        return self._session

    def _opened(self) -> Session:
        from dynrun.config import load_config
        from dynrun.models import resolve
        from dynrun.runtime.images import find_mmproj
        from dynrun.runtime.opening import Where, open_session
        from dynrun.runtime.placement import Wishes
        from dynrun.tui.builtin import make_first

        config = load_config()
        make_first(self.model)
        self.path = resolve(self.model).path
        where = Where(Wishes(mmproj=find_mmproj(self.path)), config.n_gpu_layers)
        session = open_session(self.path, where, n_threads=config.n_threads, reuse=self.placement is None)
        if self.placement is not None:
            session.planner = _as_planned(session.planner, self.placement)
        return session

    def _ready(self, n_ctx: int) -> EngineReady:
        from dynrun.gguf.header import read_header
        from dynrun.runtime.images import find_mmproj

        assert self.path is not None
        metadata = {k: v for k, v in read_header(self.path).metadata.items() if not isinstance(v, list)}
        return EngineReady(self.model, n_ctx, metadata, find_mmproj(self.path) is not None)


def _as_planned(planner: Planner, placement: Placement) -> Planner:
    """The placement that the Plan room was left with, first; below it the usual ladder."""
    from dynrun.runtime.ladder import Planner

    return Planner(lambda: (placement, False), planner.retreat, planner.remember)


def note(event: Event) -> str:
    """What an event of the engine's start means, for the line of the status."""
    from dynrun.runtime.events import Ready, Restarted, Retreated, Starting

    match event:
        case Starting(None):
            return "joining the server that runs"
        case Starting(placement, remembered):
            assert placement is not None
            return f"starting, {'as it worked before' if remembered else placement.reason or 'as planned'}"
        case Retreated(cause, _):
            return f"{cause}; trying with less"
        case Ready():
            return ""
        case Restarted():
            return "memory ran out; starting again with less"
    return ""


def _told(job: Job, pieces: _Pieces, event: Event) -> None:
    from dynrun.runtime.events import Finished, Reading, Restarted, Said, Thought

    match event:
        case Said(text):
            pieces.add(text, "")
        case Thought(text):
            pieces.add("", text)
        case Reading(done, total):
            job.post(EngineNote(f"reading {done:,} of {total:,} tokens" if done < total else ""))
        case Restarted():
            pieces.restart()
            job.post(EngineNote(note(event)))
        case Finished(answer):
            pieces.flush()
            job.post(AnswerEnded(answer))
        case _:
            job.post(EngineNote(note(event)))


def failed(error: DynrunError, partial: str = "") -> EngineFailed:
    """An error with what the engine's log says last."""
    lines: tuple[str, ...] = ()
    if error.log is not None:
        try:
            text = error.log.read_text(encoding="utf-8", errors="replace")
            lines = tuple(text.rstrip().splitlines()[-_LOG_LINES:])
        except OSError:
            lines = ()
    return EngineFailed(error.message, error.fix, lines, error.log, partial)


def stats(answer: Answer) -> str:
    """What goes below an answer: tokens, speed, how long the first one took."""
    timings = answer.timings
    first = f", first after {answer.first_token_s:.2f} s" if answer.first_token_s is not None else ""
    return f"{timings.predicted_n} tokens, {timings.predicted_per_second:.1f} a second{first}"
