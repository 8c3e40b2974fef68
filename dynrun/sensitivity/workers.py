"""Probes spread over several devices: one child process (worker.py) for each.

Takes jobs, gives their probes as they come. Which worker did a job, and in which order, changes no result on devices
of one kind; different kinds round differently. Decides nothing about which jobs there are.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

from dynrun.artifacts import translated_os_errors
from dynrun.calibration.sequences import TokenSequence
from dynrun.errors import DoesNotFitError, DynrunError, NetworkError, NotFoundError, UsageError
from dynrun.llamacpp.devices import endpoint_of
from dynrun.llamacpp.process import exit_reason, new_log, scrubbed_environment, terminate
from dynrun.sensitivity.sweep import Job, Probe

WORKER = (sys.executable, "-m", "dynrun.sensitivity.worker")
_KINDS = {kind.__name__: kind for kind in (UsageError, NetworkError, NotFoundError, DoesNotFitError)}
_TAIL_BYTES = 1 << 14

OnLost = Callable[[DynrunError], None]


class ProbePool:
    """Workers on ``devices`` (names as in devices.py; one named twice gets two), ended on leaving the context.

    A worker that fails is lost: ``on_lost`` is told why and its job goes to another one. ``command`` starts a worker.
    Raises UsageError for no device, a spec that makes no sense, or an RPC server named twice.
    """

    def __init__(
        self,
        reference: Path,
        imatrix: Path,
        sequences: Sequence[TokenSequence],
        *,
        n_ctx: int,
        n_threads: int,
        devices: Sequence[str],
        on_lost: OnLost = lambda _: None,
        command: Sequence[str] = WORKER,
    ) -> None:
        _check(devices)
        self._setup: dict[str, Any] = {
            "reference": str(reference.resolve()),
            "imatrix": str(imatrix.resolve()),
            "sequences": [[s.id, s.kind, list(s.tokens)] for s in sequences],
            "n_ctx": n_ctx,
            "n_threads": n_threads,
        }
        self._devices, self._command, self._on_lost = tuple(devices), tuple(command), on_lost
        self._workers: list[_Worker] = []
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._given = 0
        self._last_error = DynrunError("the pool of probe workers is closed")

    def __enter__(self) -> Self:
        try:
            for number, device in enumerate(self._devices):
                self._workers.append(_Worker(device, number, self._command, self._inbox))
            # All start before the first is written to, which waits until it reads.
            for worker in self._workers:
                worker.send({**self._setup, "device": worker.device})
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        while self._workers:
            self._workers.pop().close()

    def run(self, jobs: Iterable[Job]) -> Iterator[Probe]:
        """The probes in order of completion; ``jobs`` is read on only when a worker is free.

        Raises UsageError for a device that is not there, and the last worker's error where none is left.
        """
        source, again = iter(jobs), deque[Job]()
        given: dict[int, Job] = {}
        while True:
            exhausted = not self._hand_out(source, again, given)
            if exhausted and not given:
                return
            if not self._workers:
                raise self._last_error
            message = self._inbox.get()
            if message.content is None or "error" in message.content:
                self._lose(message)
                if (job := given.pop(message.worker.job, None)) is not None:
                    again.append(job)
                continue
            message.worker.ready, message.worker.job = True, -1
            # Another number: of an earlier run that was not read to its end.
            if given.pop(message.content.get("id", -1), None) is not None:
                yield Probe(**message.content["probe"])

    def _hand_out(self, source: Iterator[Job], again: deque[Job], given: dict[int, Job]) -> bool:
        """A job to each free worker; whether there may be more."""
        for worker in self._workers:
            if not worker.ready or worker.job >= 0:
                continue
            job = again.popleft() if again else next(source, None)
            if job is None:
                return False
            self._given += 1
            worker.job, given[self._given] = self._given, job
            worker.send({"id": worker.job, "job": asdict(job)})
        return True

    def _lose(self, message: _Message) -> None:
        worker = message.worker
        if worker not in self._workers:
            return  # it has said why before it ended
        self._workers.remove(worker)
        error = self._last_error = worker.error(message.content)
        worker.close()
        if isinstance(error, UsageError):
            raise error
        self._on_lost(error)


@dataclass(frozen=True)
class _Message:
    """What a worker says; no ``content`` at its end."""

    worker: _Worker
    content: dict[str, Any] | None


class _Worker:
    """A running child; ``job`` is the number of what it works on, -1 for nothing."""

    def __init__(self, device: str, number: int, command: Sequence[str], inbox: SimpleQueue[_Message]) -> None:
        self.device, self.ready, self.job = device, False, -1
        self._log = new_log(f"probe-{number}-{re.sub(r'[^A-Za-z0-9.]+', '-', device)}")
        with translated_os_errors(self._log), self._log.open("wb") as sink:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=scrubbed_environment(),
                # Ctrl+C is for the parent, which ends its children.
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, args=(inbox,), daemon=True)
        self._reader.start()

    def _read(self, inbox: SimpleQueue[_Message]) -> None:
        assert self._child.stdout is not None
        with self._child.stdout as stdout, suppress(ValueError):
            for line in stdout:
                inbox.put(_Message(self, json.loads(line)))
        inbox.put(_Message(self, None))

    def send(self, message: dict[str, Any]) -> None:
        """Nothing where the worker has ended: its reader says so."""
        assert self._child.stdin is not None
        with suppress(OSError):
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()

    def error(self, content: dict[str, Any] | None) -> DynrunError:
        """What to tell people: what it said itself, else how it ended and the last line of its log."""
        if content is not None:
            told = content["error"]
            kind = _KINDS.get(told["kind"], DynrunError)
            return kind(f"no probes on {self.device}: {told['message']}", fix=told["fix"], log=self._log)
        terminate(self._child)
        message = f"the probe worker on {self.device} ended with {exit_reason(self._child.returncode)}"
        fix = "leave the device out of --probe-devices, or mend it"
        return DynrunError(f"{message}: {self._last_line()}", fix=fix, log=self._log)

    def _last_line(self) -> str:
        tail = self._log.read_bytes()[-_TAIL_BYTES:].decode("utf-8", "replace")
        return next((line.strip()[:300] for line in reversed(tail.splitlines()) if line.strip()), "it gave no reason")

    def close(self) -> None:
        """End it and wait until it has."""
        assert self._child.stdin is not None
        terminate(self._child)
        with suppress(OSError):
            self._child.stdin.close()
        self._reader.join()


def _check(devices: Sequence[str]) -> None:
    if not devices:
        raise UsageError("no device to probe on", fix="name one: --probe-devices CPU")
    endpoints = [endpoint for device in devices if (endpoint := endpoint_of(device))]
    for endpoint in endpoints:
        if endpoints.count(endpoint) > 1:
            raise UsageError(
                f"the RPC server at {endpoint[0]}:{endpoint[1]} is named twice",
                fix="it serves one program at a time: start one for each GPU, on ports of their own",
            )
