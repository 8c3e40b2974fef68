"""A file on its way: its bytes, in any order, and a note beside them of which are there.

The name is the blob's with ``.dynrun.incomplete``, the note's ends so too: `hf cache` shows and removes both as what is
left of a download, and no program takes them for its own (older ones went on with ``<blob>.incomplete``). The note is
written now and then, after the bytes that it names, so a killed run loses the last moment at most. A note that a power
cut made a liar is found out by the file's hash.
"""

from __future__ import annotations

import json
import os
import threading
from bisect import bisect_left
from contextlib import suppress
from pathlib import Path

from dynrun.artifacts import translated_os_errors
from dynrun.hub.files import RemoteFile

# Not everywhere; the size of a file, which it brings to the disk too, is all of the rest that counts here.
_sync = getattr(os, "fdatasync", os.fsync)
SUFFIX = ".dynrun.incomplete"
NOTE_SUFFIX = ".note.dynrun.incomplete"


class Part:
    """What is there of ``file``, to become ``blob``. Its methods may be called from several threads.

    ``resumed_bytes`` were there already, from an earlier run.
    """

    def __init__(self, file: RemoteFile, blob: Path) -> None:
        self.file = file
        self.path = blob.with_name(blob.name + SUFFIX)
        self.note = blob.with_name(blob.name + NOTE_SUFFIX)
        self._blob = blob
        self._lock = threading.Lock()
        # Of the note: who saves it must not bring it back behind who finishes.
        self._note_lock = threading.Lock()
        self._finished = False
        self._flushed = self._saved = self._done = self._read()
        self.resumed_bytes = self.done_bytes

    @property
    def done_bytes(self) -> int:
        """How many bytes are there."""
        with self._lock:
            return sum(end - start for start, end in self._done)

    @property
    def prefix(self) -> int:
        """How many bytes are there from the start without a gap."""
        with self._lock:
            return self._done[0][1] if self._done and self._done[0][0] == 0 else 0

    @property
    def complete(self) -> bool:
        """Whether every byte is there; right or wrong, the hash says."""
        return self.prefix == self.file.size

    def gaps(self) -> list[tuple[int, int]]:
        """The ranges [start, end) that are not there."""
        with self._lock:
            edges = [0, *(edge for interval in self._done for edge in interval), self.file.size]
        return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]

    def prepare(self) -> None:
        """Make the file, so that threads can write into it, and its note: that has its room before a disk is full."""
        with translated_os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            if not self.note.exists():
                self._write_note(self._done)

    def add(self, start: int, end: int) -> None:
        """Bytes [start, end) are written."""
        with self._lock:
            done = self._done = list(self._done)
            at = bisect_left(done, (start, end))
            if at and done[at - 1][1] >= start:
                at -= 1
                start = done[at][0]
            last = at
            while last < len(done) and done[last][0] <= end:
                end = max(end, done[last][1])
                last += 1
            done[at:last] = [(start, end)]

    def save(self) -> None:
        """Write the note, if anything is new."""
        with self._lock:
            done = self._done
        if done == self._saved:
            return
        with translated_os_errors(self.note), self._note_lock:
            if self._finished:
                return
            self._write_note(done)
        self._saved = done

    def _write_note(self, done: list[tuple[int, int]]) -> None:
        text = json.dumps({"path": self.file.path, "size": self.file.size, "etag": self.file.etag, "done": done})
        temporary = _temporary(self.note)
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.note)
        except OSError:
            temporary.unlink(missing_ok=True)
            if not self.note.exists():
                raise
            # A full disk has no room for another one, but for this one in its place.
            with self.note.open("r+", encoding="utf-8") as stream:
                stream.write(text)
                stream.truncate()

    def flush(self) -> None:
        """Bring to the disk what was written since the last time. Raises DoesNotFitError, DynrunError."""
        with self._lock:
            done = self._done
        if done is self._flushed:
            return
        # It may have become the blob meanwhile, which is on the disk.
        with translated_os_errors(self.path), suppress(FileNotFoundError), self.path.open("r+b") as stream:
            _sync(stream.fileno())
        self._flushed = done

    def finish(self) -> None:
        """All bytes are there and right: they become the blob."""
        with translated_os_errors(self._blob):
            with self.path.open("r+b") as stream:
                os.fsync(stream.fileno())
            with self._note_lock:
                self._finished = True
                self.path.replace(self._blob)
                forget_note(self._blob)

    def discard(self) -> None:
        """Start anew: the bytes were wrong."""
        with self._lock:
            self._saved = self._done = []
        # The note first: bytes without one are never trusted.
        self.note.unlink(missing_ok=True)
        with self.path.open("wb"):
            pass

    def _read(self) -> list[tuple[int, int]]:
        """The intervals of the note, if it is this file's and the bytes can be there."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads(self.note.read_text(encoding="utf-8"))
            done = [(int(start), int(end)) for start, end in note["done"]]
            edges = [0, *(edge for interval in done for edge in interval), self.path.stat().st_size]
            if (note["etag"], note["size"]) == (self.file.etag, self.file.size) and edges == sorted(edges):
                return done if edges[-1] <= self.file.size else []
        return []


def _temporary(note: Path) -> Path:
    """Where a note is written; one name, as one process at a time fetches a file."""
    return note.with_name(f".{note.name}.new")


def forget_note(blob: Path) -> None:
    """Remove what a run that was killed behind its last byte left beside ``blob``, which is whole."""
    note = blob.with_name(blob.name + NOTE_SUFFIX)
    note.unlink(missing_ok=True)
    _temporary(note).unlink(missing_ok=True)


def stale_parts(blobs: Path, path: str | None, etag: str = "") -> list[Path]:
    """Files on their way into ``blobs``, and their notes: those of ``path`` (None: of any) that are not ``etag``."""
    found = []
    for note in blobs.glob(f"*{NOTE_SUFFIX}"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads(note.read_text(encoding="utf-8"))
            if path in (None, said["path"]) and said["etag"] != etag:
                data = note.with_name(note.name.removesuffix(NOTE_SUFFIX) + SUFFIX)
                found += [part for part in (note, data) if part.exists()]
    return found
