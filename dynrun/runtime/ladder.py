"""From a placement to a server that answers: where memory runs out, a smaller placement is tried, until one works.

Takes what is to run and a :class:`Planner`, gives events and the server. What to try next is the planner's affair
(retreat.py), why the last one failed is read in llamacpp/server_log.py; this is the loop between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event as Flag

from dynrun.errors import DynrunError
from dynrun.llamacpp.devices import RPC_PREFIX, endpoint_of, greet
from dynrun.llamacpp.server import Listen, LlamaServer, ServerDiedError, ServerOutOfMemoryError, template_options
from dynrun.runtime.events import Event, Ready, Retreated, Starting
from dynrun.runtime.placement import Placement


@dataclass(frozen=True)
class Job:
    """What is to run: ``model`` on ``n_threads``; a Jinja file instead of its template; RPC servers ``host:port``."""

    model: Path
    n_threads: int
    chat_template: Path | None = None
    rpc: tuple[str, ...] = ()
    listen: Listen = field(default_factory=Listen)

    def options(self, placement: Placement) -> tuple[str, ...]:
        """llama-server's options. Raises NotFoundError where the template is no file."""
        rpc = ("--rpc", ",".join(self.rpc)) if self.rpc else ()
        placed = (*rpc, *placement.argv, "-t", str(self.n_threads))
        # It wants the cache of other prompts.
        idle = () if placement.choice.prompt_cache_mib else ("--no-cache-idle-slots",)
        return ("-m", str(self.model), *placed, *idle, *template_options(self.chat_template))


@dataclass(frozen=True)
class Planner:
    """Where a model goes. ``first`` gives a placement, and whether it is a remembered one; ``retreat`` the next
    smaller one after an error, or None; ``remember`` keeps one that worked where a larger one did not; ``learn`` takes
    the speed of text generation that a placement reached, in tokens per second."""

    first: Callable[[], tuple[Placement, bool]]
    retreat: Callable[[Placement, ServerOutOfMemoryError], Placement | None]
    remember: Callable[[Placement], None] = lambda _: None
    learn: Callable[[Placement, float], None] = lambda _placement, _speed: None


@dataclass(frozen=True)
class Running:
    """A server and where its model lies."""

    server: LlamaServer
    placement: Placement


def start(job: Job, planner: Planner, cancel: Flag | None = None) -> Generator[Event, None, Running]:
    """Start the first placement, or the largest smaller one that memory allows.

    Raises ServerOutOfMemoryError where none is left, ServerDiedError for any other death, CancelledError.
    """
    placement, remembered = planner.first()
    yield Starting(placement, remembered)
    return (yield from _started(job, planner, placement, False, cancel))


def retreat(
    job: Job, planner: Planner, failed: Placement, error: ServerOutOfMemoryError, cancel: Flag | None = None
) -> Generator[Event, None, Running]:
    """Start again after ``failed`` ended with ``error``; raises it where nothing smaller is left."""
    smaller = _smaller(planner, failed, error)
    yield Retreated(error.message, smaller)
    return (yield from _started(job, planner, smaller, True, cancel))


def _started(
    job: Job, planner: Planner, placement: Placement, retreated: bool, cancel: Flag | None
) -> Generator[Event, None, Running]:
    while True:
        began = time.monotonic()
        server = LlamaServer(job.options(placement), name=job.model.name, listen=job.listen, cancel=cancel)
        try:
            server.__enter__()
            break
        except ServerDiedError as died:
            error = explained(job, died)
            if not isinstance(error, ServerOutOfMemoryError):
                raise
            placement, retreated = _smaller(planner, placement, error), True
        yield Retreated(error.message, placement)
    try:
        if retreated:
            # A full disk must not keep a model from running.
            with suppress(DynrunError, OSError):
                planner.remember(placement)
        yield Ready(server.url, placement.choice.n_ctx, time.monotonic() - began)
    except BaseException:
        # The caller went away between the start and the answer.
        server.stop()
        raise
    return Running(server, placement)


def explained(job: Job, died: ServerDiedError) -> ServerDiedError:
    """``died``, or out-of-memory where RPC servers broke the connection and still live: one that has no memory for what
    it is sent hangs up without a word (ggml-rpc.cpp, recv_msg)."""
    if not job.rpc or isinstance(died, ServerOutOfMemoryError) or "Remote RPC server" not in died.message:
        return died
    for server in job.rpc:
        try:
            greet(*(endpoint_of(RPC_PREFIX + server) or ("", 0)))
        except DynrunError:
            return died
    message = f"an RPC server hung up on llama-server with {job.model.name}, probably because its memory ran out"
    return ServerOutOfMemoryError(message, fix="give it more memory", log=died.log, lines=died.last_lines)


def _smaller(planner: Planner, failed: Placement, error: ServerOutOfMemoryError) -> Placement:
    smaller = planner.retreat(failed, error)
    if smaller is None:
        raise error
    return smaller
