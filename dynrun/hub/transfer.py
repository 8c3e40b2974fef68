"""Fetch files in parallel ranges until each has the hash that it should have.

Takes parts (:mod:`dynrun.hub.part`) and gives blobs. What came is kept, whatever happens: a broken connection goes on
at its byte, wrong bytes cost the file that they are in. Threads: ``connections`` that fetch pieces, in the order of the
files so that few are open at a time; some that hash behind them, while the bytes are still in memory; one that brings
them to the disk, so that little is left of that at the end; the caller's, which writes notes and shows progress.
"""

from __future__ import annotations

import hashlib
import io
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from dynrun.artifacts import translated_os_errors
from dynrun.errors import DynrunError, NetworkError
from dynrun.hub.http import STALL_S
from dynrun.hub.part import Part
from dynrun.hub.piece import Piece
from dynrun.hub.source import HttpSource, Incoming, PassingError
from dynrun.hub.xet import XetSource

_HASHERS = 3
_HASH_BYTES = 4 << 20
_POLL_S = 0.02
_SHOW_S = 0.1
_SAVE_S = 1.0
# Connections are added while less than this comes in: where few bring all that a machine can take, more cost only CPU.
_ENOUGH_BYTES_S = 300e6
_GROW_S = 0.25
_GROW_BY = 2
_FLUSH_S = 0.5
_END_S = 0.5
_SPLIT_POLL_S = 1.0
# Less than this is not worth another connection.
_SPLIT_BYTES = 8 << 20
# How long what went wrong is shown.
_NOTE_S = 5.0
_LONGEST_BACKOFF_S = 30.0


@dataclass(frozen=True)
class TransferSettings:
    """``attempts`` in a row without a byte are made for a piece, if no more than ``refusals`` of them read like one.

    A file with wrong bytes is begun ``restarts`` times more. When nothing else is left, idle connections take half of
    a piece that would last longer than ``split_s``: some connections are slow. Elsewhere nobody is cut off, as what is
    on the way then would be fetched twice.
    """

    connections: int = 8
    stall_s: float = STALL_S
    backoff_s: float = 1.0
    attempts: int = 8
    refusals: int = 4
    restarts: int = 2
    piece_bytes: int = 64 << 20
    split_s: float = 10.0


@dataclass(frozen=True)
class FileProgress:
    """``done`` of ``size`` bytes are here; ``checked`` once the hash is right."""

    path: str
    size: int
    done: int
    checked: bool


@dataclass(frozen=True)
class Progress:
    """``note`` is what went wrong last and is being tried again; empty where nothing did."""

    files: tuple[FileProgress, ...]
    fetched_bytes: int
    note: str = ""


class _StoppedError(Exception):
    pass


class Transfer:
    """One run over ``parts``; ``on_checked`` is called, in a thread of the transfer, for each that became a blob."""

    def __init__(self, parts: Sequence[Part], settings: TransferSettings, on_checked: Callable[[Part], None]) -> None:
        self._parts = tuple(parts)
        self._settings = settings
        self._on_checked = on_checked
        http = HttpSource(stall_s=settings.stall_s, connections=settings.connections)
        self._source = XetSource(http, settings.stall_s)
        self._lock = threading.Condition()
        self._queue = deque(piece for part in parts for piece in self._pieces(part))
        self._active: list[Piece] = []
        # Files of a server without ranges: one connection each.
        self._whole: dict[Part, Piece] = {}
        self._unhashed = deque(parts)
        self._checked: set[Part] = set()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._fetched = 0
        self._wanted = _GROW_BY
        self._note, self._noted = "", 0.0

    @property
    def fetched_bytes(self) -> int:
        """Bytes that came in, what was wrong or too much included."""
        return self._fetched

    def run(self, watch: Callable[[Progress], None]) -> None:
        """Fetch everything.

        ``watch`` is called about ten times a second in this thread; what it raises ends the transfer, like Ctrl+C: at
        once, and everything that came is kept. Raises NetworkError, RefusedError and NotFoundError after some tries;
        ChangedError; DoesNotFitError where the disk is full.
        """
        for part in self._parts:
            part.prepare()
        count = self._settings.connections
        work: list[Callable[[], None]] = [partial(self._fetch_all, number) for number in range(count)]
        work += [self._hash_all] * min(_HASHERS, len(self._parts)) + [self._flush_all]
        threads = [threading.Thread(target=self._guard, args=(loop,), daemon=True) for loop in work]
        try:
            for thread in threads:
                thread.start()
            self._attend(watch)
        finally:
            self._end(threads)
        if self._error is not None:
            raise self._error
        watch(self.progress())

    def progress(self) -> Progress:
        """How far everything is."""
        files = [FileProgress(p.file.path, p.file.size, p.done_bytes, p in self._checked) for p in self._parts]
        fresh = time.monotonic() - self._noted < _NOTE_S
        return Progress(tuple(files), self._fetched, self._note if fresh else "")

    def _tell(self, note: str) -> None:
        self._note, self._noted = note, time.monotonic()

    def _attend(self, watch: Callable[[Progress], None]) -> None:
        saved = grown = time.monotonic()
        fetched = 0
        while len(self._checked) < len(self._parts) and self._error is None:
            watch(self.progress())
            now = time.monotonic()
            if now - saved >= _SAVE_S:
                self._save()
                saved = now
            if now - grown >= _GROW_S:
                self._grow((self._fetched - fetched) / (now - grown))
                grown, fetched = now, self._fetched
            with self._lock:
                self._lock.wait(_SHOW_S)

    def _grow(self, bytes_s: float) -> None:
        """Let more connections begin, unless what comes in is enough."""
        if bytes_s < _ENOUGH_BYTES_S:
            with self._lock:
                self._wanted += _GROW_BY
                self._lock.notify_all()

    def _end(self, threads: Sequence[threading.Thread]) -> None:
        with self._lock:
            self._stop.set()
            self._lock.notify_all()
        self._source.cut()
        deadline = time.monotonic() + _END_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        # One that is still connecting ends by itself, and writes nothing.
        if not any(thread.is_alive() for thread in threads):
            self._source.close()
        self._save()

    def _save(self) -> None:
        for part in self._parts:
            if part not in self._checked:
                part.save()

    def _guard(self, loop: Callable[[], None]) -> None:
        """Run a thread's ``loop``; its first error ends all."""
        try:
            loop()
        except _StoppedError:
            pass
        except BaseException as error:
            with self._lock:
                if self._error is None and not self._stop.is_set():
                    self._error = error
                self._stop.set()
                self._lock.notify_all()

    def _pieces(self, part: Part) -> Iterator[Piece]:
        """The gaps of ``part``, cut into pieces at multiples of their size."""
        step = self._settings.piece_bytes
        for start, end in part.gaps():
            edges = [start, *range((start // step + 1) * step, end, step), end]
            yield from (Piece(part, a, b) for a, b in pairwise(edges))

    def _fetch_all(self, number: int) -> None:
        with self._lock:
            while number >= self._wanted and not self._stop.is_set():
                self._lock.wait()
        while (piece := self._next_piece()) is not None:
            self._fetch(piece)
            with self._lock:
                self._active.remove(piece)
                self._lock.notify_all()

    def _next_piece(self) -> Piece | None:
        """A piece of the queue, or the second half of the slowest; None at the end of all."""
        with self._lock:
            while not self._stop.is_set() and len(self._checked) < len(self._parts):
                piece = self._queue.popleft() if self._queue else self._split()
                if piece is not None:
                    piece.begin()
                    self._active.append(piece)
                    return piece
                self._lock.wait(_SPLIT_POLL_S)
        return None

    def _split(self) -> Piece | None:
        seconds = self._settings.split_s
        found = [piece for piece in self._active if piece.part not in self._whole]
        slowest = max(found, key=lambda piece: piece.seconds_left(seconds / 4), default=None)
        if slowest is None or slowest.seconds_left(seconds / 4) < seconds:
            return None
        return slowest.halve() if slowest.end - slowest.position >= _SPLIT_BYTES else None

    def _fetch(self, piece: Piece) -> None:
        failures = refusals = 0
        while piece.position < piece.end:
            before = piece.position
            with self._lock:
                piece.stop = piece.end
            try:
                with self._source.open(piece.part.file, piece.position, piece.end) as incoming:
                    if incoming.whole and not self._claim(piece):
                        return
                    self._receive(piece, incoming)
                if piece.position >= piece.stop:
                    continue
                failure = PassingError("the server sends less than it was asked for")
            except PassingError as error:
                failure = error
            if piece.position > before:
                failures = refusals = 0
            failures += 1
            refusals += failure.refused is not None
            often = failures >= self._settings.attempts or refusals >= self._settings.refusals
            self._wait(piece, failure, failures, often=often)

    def _claim(self, piece: Piece) -> bool:
        """The server sends all of the file: this connection takes all of it, unless another one does."""
        part = piece.part
        with self._lock:
            if part not in self._whole:
                self._whole[part] = piece
                self._queue = deque(queued for queued in self._queue if queued.part is not part)
                piece.position, piece.end = part.gaps()[0][0], part.file.size
                piece.stop = piece.end
            return self._whole[part] is piece

    def _receive(self, piece: Piece, incoming: Incoming) -> None:
        """Write what comes in, to the end of the piece, which another connection may bring nearer meanwhile."""
        part, at = piece.part, incoming.start
        with translated_os_errors(part.path), part.path.open("r+b", buffering=0) as stream:
            stream.seek(piece.position)
            for chunk in incoming.chunks:
                if self._stop.is_set():
                    raise _StoppedError
                with self._lock:
                    self._fetched += len(chunk)
                    useful = memoryview(chunk)[max(0, piece.position - at) :][: piece.end - piece.position]
                at += len(chunk)
                _write(stream, useful)
                part.add(piece.position, piece.position + len(useful))
                piece.position += len(useful)
                if piece.position >= piece.stop:
                    return

    def _wait(self, piece: Piece, error: PassingError, failures: int, *, often: bool) -> None:
        """Wait before trying again; raise what is to be said where that was done often enough."""
        if self._stop.is_set():
            raise _StoppedError
        file = piece.part.file
        if often:
            raise error.refused or NetworkError(
                f"{file.path} of {file.repository} could not be fetched: {error}",
                fix="check the network, and run the same command again: it goes on where it was",
            ) from error
        backoff = self._settings.backoff_s * 2 ** (failures - 1) * random.uniform(0.75, 1.25)  # noqa: S311
        seconds = min(backoff, _LONGEST_BACKOFF_S) if error.wait_s is None else error.wait_s
        self._tell(f"{file.name}: {error}; trying again in {seconds:.0f} s")
        if self._stop.wait(seconds):
            raise _StoppedError

    def _flush_all(self) -> None:
        while not self._stop.wait(_FLUSH_S):
            for part in self._parts:
                if part not in self._checked:
                    part.flush()

    def _hash_all(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                if not self._unhashed:
                    return
                part = self._unhashed.popleft()
            self._check(part)
            with self._lock:
                self._checked.add(part)
                self._lock.notify_all()

    def _check(self, part: Part) -> None:
        """See ``part`` through until its hash is right."""
        for _ in range(self._settings.restarts):
            if self._hash(part) == part.file.etag:
                break
            self._tell(f"{part.file.name} came with wrong bytes; fetching it again")
            self._source.distrust(part.file)
            with self._lock:
                self._whole.pop(part, None)
                part.discard()
                self._queue.extendleft(reversed(list(self._pieces(part))))
                self._lock.notify_all()
        else:
            if self._hash(part) != part.file.etag:
                part.discard()
                times = f"{self._settings.restarts + 1} times"
                raise NetworkError(
                    f"{part.file.path} of {part.file.repository} came with wrong bytes {times}",
                    fix="try again later, or from another network",
                )
        part.finish()
        self._on_checked(part)

    def _hash(self, part: Part) -> str:
        """The hash of all bytes of ``part``, computed behind those that come in: git's SHA-1 where it is not in LFS."""
        size = part.file.size
        digest = hashlib.sha256() if part.file.sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        buffer = memoryview(bytearray(min(_HASH_BYTES, size)))
        position = 0
        with part.path.open("rb", buffering=0) as stream:
            while position < size:
                if part.prefix - position < min(len(buffer), size - position):
                    if self._stop.wait(_POLL_S):
                        raise _StoppedError
                    continue
                n = stream.readinto(buffer)
                if not n:
                    raise DynrunError(f"{part.path} was cut by another program", fix="run the same command again")
                digest.update(buffer[: min(n, size - position)])
                position += n
        return digest.hexdigest()


def _write(stream: io.FileIO, data: memoryview) -> None:
    while data:
        data = data[stream.write(data) :]
