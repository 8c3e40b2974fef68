"""Work in threads, in named groups, that ends in one frozen message; what it calls knows nothing of Textual.

The threads are daemons: a transfer that waits for a silent server must not keep the app from quitting, and what it
calls survives a kill anyway.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from textual.dom import DOMNode
from textual.message import Message
from textual.worker import Worker

from dynrun.errors import DynrunError
from dynrun.tui.messages import JobDone, JobFailed, JobStopped


class StoppedError(Exception):
    """Raised inside a job, at its next :meth:`Job.check`, when the user has stopped it."""


@dataclass(frozen=True)
class Job:
    """What the work is handed. ``stopped`` is set when the user stops it, or the app quits."""

    node: DOMNode
    group: str
    name: str
    stopped: threading.Event

    def check(self) -> None:
        """For callbacks of progress, from any thread. Raises StoppedError."""
        if self.stopped.is_set():
            raise StoppedError

    def post(self, message: Message) -> None:
        """Tell the node that started this, from any thread."""
        self.node.post_message(message)


def start_job(
    node: DOMNode, work: Callable[[Job], Any], *, group: str, name: str = "", exclusive: bool = False
) -> Worker[None]:
    """Run ``work`` in a thread; ``node`` gets JobDone with what it returns, JobFailed or JobStopped.

    ``exclusive``: what of this group still runs is stopped first, and its result, if it comes, is not told.
    """
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    worker: Worker[None] = node.run_worker(partial(_until, ended), name=name or group, group=group, exclusive=exclusive)
    job = Job(node, group, name, worker.cancelled_event)

    def run() -> None:
        message = _outcome(job, work)
        if exclusive and job.stopped.is_set():
            message = JobStopped(group, name)
        # The app may have ended meanwhile, and its loop with it.
        with suppress(RuntimeError):
            node.post_message(message)
            loop.call_soon_threadsafe(ended.set)

    context = contextvars.copy_context()
    threading.Thread(target=lambda: context.run(run), name=f"{group}:{name}", daemon=True).start()
    return worker


def stop_jobs(node: DOMNode, group: str) -> bool:
    """Ask the running jobs of ``node`` in ``group`` to stop; whether there were any."""
    return bool(node.workers.cancel_group(node, group))


def running(node: DOMNode, group: str) -> bool:
    """Whether a job of ``group`` runs for ``node`` and nobody has stopped it."""
    return any(
        worker.node is node and worker.group == group and not (worker.is_finished or worker.is_cancelled)
        for worker in node.workers
    )


async def _until(ended: asyncio.Event) -> None:
    await ended.wait()


def _outcome(job: Job, work: Callable[[Job], Any]) -> Message:
    try:
        return JobDone(job.group, job.name, work(job))
    except (StoppedError, KeyboardInterrupt):
        return JobStopped(job.group, job.name)
    except DynrunError as error:
        if job.stopped.is_set():
            # A program that was ended says that it failed.
            return JobStopped(job.group, job.name)
        return JobFailed(job.group, job.name, str(error), error.exit_code)
    except Exception as error:
        return JobFailed(job.group, job.name, str(_logged(error)))


def _logged(error: Exception) -> DynrunError:
    """A fault of ours, for people: what it says, and the log with the traceback."""
    import traceback

    from dynrun.llamacpp.process import new_log

    reason = f"unexpected error: {type(error).__name__}: {error}"
    try:
        log = new_log("crash")
        log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except (OSError, DynrunError):
        return DynrunError(reason)
    return DynrunError(reason, fix="please report it with the log", log=log)
