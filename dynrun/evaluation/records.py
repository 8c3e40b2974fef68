"""Records of a benchmark's files: JSON lines, JSON, Parquet, CSV with a header; from a path or from the Hub.

Takes a place, gives plain dictionaries with their position for error messages; knows no benchmark.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrun.calibration.hub import PREFIX, hub_files, parse_hub_name
from dynrun.errors import DynrunError, NotFoundError, UsageError


@dataclass(frozen=True)
class Record:
    """A record and where it stands, for people."""

    fields: Mapping[str, Any]
    place: str

    def refuse(self, reason: str) -> UsageError:
        """The error that this record is wrong."""
        return UsageError(f"{self.place}: {reason}", fix="correct the file, or see that it is the benchmark named")


def data_files(data: str, *, default_config: str = "", split: str = "") -> list[Path]:
    """The files that ``data`` means: itself, or those of ``hf:owner/name[:config][:split]`` on the Hub.

    Raises NotFoundError, and for the Hub what calibration/hub.py raises.
    """
    if not data.startswith(PREFIX):
        path = Path(data).expanduser()
        if not path.exists():
            raise NotFoundError(f"{path} does not exist", fix="check --data")
        return [path]
    repository, *rest = data.removeprefix(PREFIX).split(":")
    config = rest[0] if rest else default_config
    part = (rest[1] if len(rest) > 1 else "") or split
    return hub_files(parse_hub_name(":".join((PREFIX + repository, config, part)).rstrip(":")))[0]


def read_records(path: Path) -> list[Record]:
    """All records of a file, by its ending. Raises UsageError, DynrunError."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{path} is no file of records", fix=f"give one of {', '.join(_READERS)}")
    with errors_for_people(path):
        found = list(reader(path))
    if not found:
        raise UsageError(f"{path} holds no records", fix="check --data")
    return found


def read_table(path: Path) -> list[list[str]]:
    """The rows of a CSV file as they are. Raises UsageError, DynrunError."""
    with errors_for_people(path), path.open(encoding="utf-8-sig", newline="") as stream:
        return [row for row in csv.reader(stream, strict=True) if row]


@contextmanager
def errors_for_people(path: Path) -> Iterator[None]:
    """What goes wrong in reading ``path`` as an error for people."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text", fix="convert it to UTF-8") from error
    except OSError as error:
        raise DynrunError(f"{path} cannot be read: {error.strerror or error}", fix="check its permissions") from error
    except (ValueError, csv.Error, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{path} cannot be read: {reason}", fix="check that the file is whole") from error


def _json_lines(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8") as stream:
        for i, line in enumerate(stream, 1):
            if line.strip():
                yield _record(json.loads(line), f"{path}:{i}")


def _json(path: Path) -> Iterator[Record]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, list):
        raise ValueError("it is no list of records")
    for i, fields in enumerate(data, 1):
        yield _record(fields, f"{path}, record {i}")


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    parquet: Any = pyarrow.parquet
    with path.open("rb") as stream:
        i = 0
        for batch in parquet.ParquetFile(stream).iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                i += 1
                yield _record(fields, f"{path}, row {i}")


def _csv(path: Path) -> Iterator[Record]:
    header, *rows = read_table(path) or [[]]
    for i, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(f"row {i} has {len(row)} fields, the header {len(header)}")
        yield Record(dict(zip(header, row, strict=True)), f"{path}, row {i}")


def _record(fields: Any, place: str) -> Record:
    if not isinstance(fields, dict):
        raise ValueError(f"{place} is no record")
    return Record(fields, place)


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
}
