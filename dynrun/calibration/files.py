"""A user's files as a source: JSON Lines, JSON, Parquet, plain text, each also gzipped.

Takes paths, gives conversations; memory is bounded whatever the size of the files, which are streamed. What a record
means is records.py's; nothing is rendered or split here.
"""

from __future__ import annotations

import gzip
import heapq
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, TextIO, cast

from dynrun.artifacts import sha256_file
from dynrun.calibration.conversation import Conversation
from dynrun.calibration.dataset import Source
from dynrun.calibration.records import KNOWN_KEYS, MalformedRecordError, conversation_of, passage
from dynrun.errors import DynrunError, NotFoundError, UsageError

# About 16 M tokens: more than any calibration draws.
LIMIT_CHARS = 64_000_000
# Characters of plain text in one passage, about 1,000 tokens; no less than the other where a document ends.
_PASSAGE, _SHORTEST_PASSAGE = 4_000, 1_000
# Passages of one document: neighbours stay in one split, yet no file is one single document.
_SECTION, _LONGEST_DOCUMENT = 10, 40
# The title of an article of WikiText (" = Title = ", not " = = Section = = ") or of WikiExtractor.
_HEADING = re.compile(r"\s?= [^=\n](?:.*[^=\n])? =\s*$|<doc id=")
# One record may not be longer, in characters of JSON.
_LONGEST_RECORD = 64_000_000
_CHUNK = 1 << 18
_MALFORMED_SHARE, _MALFORMED_NAMED = 0.05, 100

# The line (or row) that a record begins in, and the record, or why it is none.
_Record = tuple[int, object]
_Reader = Callable[[IO[bytes]], Iterator[_Record]]


def read_file(path: Path, *, name: str, limit_chars: int = LIMIT_CHARS) -> Source:
    """The conversations of one file; what it is, its suffix says: .jsonl, .ndjson, .json, .parquet, else plain text.

    Raises NotFoundError where there is no file, DynrunError where it cannot be read, is empty or binary, or more than
    5% of its records are malformed.
    """
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise NotFoundError(f"the calibration file {path} {what}", fix="check the path")
    return read_files([path], name=name, sha256="", limit_chars=limit_chars)


def read_files(paths: Sequence[Path], *, name: str, sha256: str, limit_chars: int = LIMIT_CHARS) -> Source:
    """The conversations of several files as one source; ``sha256`` pins them (empty: that of the only file).

    At most ``limit_chars`` characters are kept: those conversations whose hashes are smallest, a random sample of all
    that depends neither on their order nor on their length. Copies count once. Raises as :func:`read_file`.
    """
    reading = _Reading(limit_chars)
    for path in paths:
        with _errors_for_people(path):
            reading.take(path)
            sha256 = sha256 or sha256_file(path)
    return reading.source(name, sha256)


@dataclass
class _Sample:
    """The conversations with the smallest ids whose sizes sum up to at most ``limit`` characters (bottom-k)."""

    limit: int
    _heap: list[tuple[int, int, Conversation]] = field(default_factory=list)
    _known: set[int] = field(default_factory=set)
    _size: int = 0
    # Ids from here on are left out: without it a small late one could stand where a large earlier one did not.
    _bound: int = 1 << 96

    def add(self, conversation: Conversation) -> None:
        rank = int(conversation.id, 16)
        if rank >= self._bound or rank in self._known:
            return
        size = len(conversation.text) or len(json.dumps([conversation.messages, conversation.tools]))
        heapq.heappush(self._heap, (-rank, size, conversation))
        self._known.add(rank)
        self._size += size
        while self._size > self.limit and len(self._heap) > 1:
            largest, size, _ = heapq.heappop(self._heap)
            self._bound = -largest
            self._known.discard(-largest)
            self._size -= size

    def conversations(self) -> tuple[Conversation, ...]:
        return tuple(conversation for _, _, conversation in sorted(self._heap, key=lambda one: -one[0]))


@dataclass
class _Reading:
    """What has been read so far."""

    limit_chars: int
    n_records: int = 0
    n_malformed: int = 0
    malformed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sample = _Sample(self.limit_chars)

    def take(self, path: Path) -> None:
        """Add a file."""
        before = self.n_records
        stem = path.name.removesuffix(".gz")
        reader = _READERS.get(Path(stem).suffix.lower())
        with path.open("rb") as file, _unzipped(file, stem != path.name) as stream:
            if reader is None:
                self._plain_text(stream)
            else:
                for line, record in reader(stream):
                    self._record(f"{path.name}:{line}", record)
        if self.n_records == before:
            raise DynrunError(f"{path} is empty", fix="give a file with text in it")

    def _record(self, place: str, record: object) -> None:
        self.n_records += 1
        try:
            if isinstance(record, MalformedRecordError):
                raise record
            conversation = conversation_of(record)
            if len(conversation.text) > 2 * _PASSAGE:
                document = conversation.document or conversation.id
                for text in _passages(_lines(io.StringIO(conversation.text))):
                    self._sample.add(passage(text, document))
            else:
                self._sample.add(conversation)
        except MalformedRecordError as error:
            self.n_malformed += 1
            if len(self.malformed) < _MALFORMED_NAMED:
                self.malformed.append(f"{place}: {error}")

    def _plain_text(self, stream: IO[bytes]) -> None:
        document, length, titled = "", 0, False
        with _decoded(stream) as decoded:
            for text in _passages(_lines(decoded)):
                self.n_records += 1
                title = _HEADING.match(text.partition("\n")[0]) is not None
                titled |= title
                if title or length == (_LONGEST_DOCUMENT if titled else _SECTION):
                    document = ""
                # The hash of its first passage names a document.
                document, length = (document, length + 1) if document else (passage(text).id, 1)
                self._sample.add(passage(text, document))

    def source(self, name: str, sha256: str) -> Source:
        """All that was read. Raises UsageError where too much of it was malformed."""
        if self.n_malformed > _MALFORMED_SHARE * self.n_records:
            message = f"{name}: {self.n_malformed} of {self.n_records} records are malformed"
            raise UsageError(
                f"{message} ({'; '.join(self.malformed[:3])})", fix="correct or remove them; up to 5% are skipped"
            )
        conversations = self._sample.conversations()
        return Source(name, sha256, conversations, self.n_records, self.n_malformed, tuple(self.malformed))


def _unzipped(file: IO[bytes], zipped: bool) -> IO[bytes]:
    return cast("IO[bytes]", gzip.GzipFile(fileobj=file)) if zipped else file


def _passages(lines: Iterable[str]) -> Iterator[str]:
    """Text in passages of about 4,000 characters: they end between paragraphs, or where a document does.

    Documents of a few lines share a passage: stubs make poor sequences.
    """
    held: list[str] = []
    size = 0
    for line in lines:
        full = size + len(line) > _PASSAGE * 5 // 4 or (size >= _PASSAGE and not line.strip())
        if full or (size >= _SHORTEST_PASSAGE and _HEADING.match(line)):
            yield from _stripped(held)
            held, size = [], 0
        held.append(line)
        size += len(line)
    yield from _stripped(held)


def _stripped(lines: Iterable[str]) -> Iterator[str]:
    text = "".join(lines).strip("\n")
    if text.strip():
        yield text


def _lines(stream: TextIO) -> Iterator[str]:
    """Lines with their ends; those longer than a passage in pieces, cut between words."""
    rest = ""
    while piece := stream.readline(_PASSAGE):
        if "\0" in piece:
            raise ValueError("it is binary")
        piece, rest = rest + piece, ""
        if len(piece) >= _PASSAGE and not piece.endswith("\n"):
            cut = piece.rfind(" ", _PASSAGE // 2) + 1 or len(piece)
            piece, rest = piece[:cut], piece[cut:]
        yield piece
    if rest:
        yield rest


def _decoded(stream: IO[bytes]) -> TextIO:
    return io.TextIOWrapper(stream, encoding="utf-8-sig")


def _json_lines(stream: IO[bytes]) -> Iterator[_Record]:
    number = 0
    while data := stream.readline(_LONGEST_RECORD):
        number += 1
        if len(data) == _LONGEST_RECORD and not data.endswith(b"\n"):
            while (rest := stream.readline(_CHUNK)) and not rest.endswith(b"\n"):
                pass
            yield number, MalformedRecordError("too long")
        elif data.strip():
            yield number, _parsed(data)


def _parsed(data: bytes) -> object:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return MalformedRecordError("not UTF-8")
    except (ValueError, RecursionError):
        return MalformedRecordError("not JSON")


def _json(stream: IO[bytes]) -> Iterator[_Record]:
    """A list of records, JSON Lines under another name, or objects one after the other."""
    first = next((line for line in iter(lambda: stream.readline(_LONGEST_RECORD), b"") if line.strip()), b"")
    stream.seek(0)
    starts_list = first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not starts_list and not isinstance(_parsed(first), MalformedRecordError):
        yield from _json_lines(stream)
    else:
        with _decoded(stream) as text:
            yield from _JsonStream(text).records()


@dataclass
class _JsonStream:
    """A parser of values one after the other, which holds one chunk of the text at a time."""

    stream: TextIO
    text: str = ""
    at: int = 0
    line: int = 1

    def records(self) -> Iterator[_Record]:
        listed = self._next() == "["
        if listed:
            self._advance(self.at + 1)
        while (sign := self._next()) and not (listed and sign == "]"):
            if sign == ",":
                self._advance(self.at + 1)
                continue
            line = self.line
            yield line, self._value()
        if listed and not sign:
            raise ValueError(f"line {self.line}: its list has no end")

    def _value(self) -> object:
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except ValueError as error:
                if len(self.text) < _LONGEST_RECORD and self._more():
                    continue
                raise ValueError(f"line {self.line}: not JSON") from error
            # A number at the chunk's end may go on in the next.
            if end < len(self.text) or not self._more():
                self._advance(end)
                return value

    def _next(self) -> str:
        """The next character that is no space, at ``at``; empty at the end."""
        while True:
            space = _SPACE.match(self.text, self.at)
            self._advance(space.end() if space else self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def _advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def _more(self) -> bool:
        # As much again as there is: a record of many chunks is parsed a few times only.
        piece = self.stream.read(max(_CHUNK, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)


_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"\s*")


def _parquet(stream: IO[bytes]) -> Iterator[_Record]:
    import pyarrow.parquet

    parquet: Any = pyarrow.parquet
    file = parquet.ParquetFile(stream)
    names = file.schema_arrow.names
    if not (wanted := [name for name in names if name in KNOWN_KEYS]):
        raise ValueError(f"it has no column of conversations or text, only {', '.join(islice(names, 8))}")
    row = 0
    for batch in file.iter_batches(batch_size=256, columns=wanted):
        for record in batch.to_pylist():
            row += 1
            yield row, _without_nulls(record)


def _without_nulls(value: Any) -> Any:
    """Parquet gives every struct all fields that any row has."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


_READERS: dict[str, _Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}


@contextmanager
def _errors_for_people(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DynrunError(f"{path} is not UTF-8 text", fix="convert it to UTF-8, or give another file") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise DynrunError(f"{path} cannot be read: {reason}", fix="check its permissions and its format") from error
    except (ValueError, EOFError, zlib.error, NotImplementedError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DynrunError(f"{path} cannot be read: {reason}", fix="check that the file is whole") from error
