"""The imatrix format of llama.cpp before GGUF (``.dat``): means only, no number of tokens per expert.

Takes a file, gives what lies in it; no length in it is believed before it is checked. Writes none. Format:
tools/imatrix/imatrix.cpp, save_imatrix_legacy; common/imatrix-loader.cpp, common_imatrix_load_legacy.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dynrun.errors import DynrunError, NotFoundError

# llama-imatrix takes a call for a chunk of its own context, 512 unless told otherwise, when it reads such a file.
LEGACY_CHUNK_SIZE = 512
_MAX_NAME = 256


@dataclass(frozen=True)
class LegacyEntry:
    """``values`` [ne0 × n_expert] float32: mean x² per column times ``n_calls`` (as they are where that is 0)."""

    values: npt.NDArray[np.float32]
    n_calls: int


@dataclass(frozen=True)
class LegacyImatrix:
    """A whole file; ``chunk_count`` and ``dataset`` are 0 and empty in files without that trailer."""

    entries: Mapping[str, LegacyEntry]
    chunk_count: int
    dataset: str


class _BadFileError(Exception):
    pass


def read_legacy(path: Path) -> LegacyImatrix:
    """Read the file at ``path``. Raises NotFoundError where there is none, DynrunError for one that is no imatrix."""
    try:
        return _parse(_Reader(path.read_bytes()))
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist", fix="check the path") from error
    except OSError as error:
        raise DynrunError(f"{path} cannot be read: {error.strerror}", fix="check its permissions") from error
    except _BadFileError as error:
        raise DynrunError(
            f"{path} is no imatrix: no GGUF, and as a legacy file {error}", fix="make one with `dynrun imatrix`"
        ) from error


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, n: int) -> bytes:
        if n > self.left:
            raise _BadFileError(f"it is truncated or damaged: {n} bytes wanted, {self.left} are left")
        self.at += n
        return self.data[self.at - n : self.at]

    def integer(self) -> int:
        return int(struct.unpack("<i", self.take(4))[0])


def _parse(reader: _Reader) -> LegacyImatrix:
    n_entries = reader.integer()
    # The smallest entry: three integers, a name of one byte and one value.
    if not 1 <= n_entries <= reader.left // 17:
        raise _BadFileError(f"it claims {n_entries} entries in {len(reader.data)} bytes")
    entries: dict[str, LegacyEntry] = {}
    for _ in range(n_entries):
        name = _name(reader)
        if name in entries:
            raise _BadFileError(f"it has the entry {name!r:.80} twice")
        entries[name] = _entry(reader, name)
    return LegacyImatrix(entries, *_trailer(reader))


def _name(reader: _Reader) -> str:
    length = reader.integer()
    if not 1 <= length <= _MAX_NAME:
        raise _BadFileError(f"it has a name of {length} bytes")
    try:
        return reader.take(length).decode()
    except UnicodeDecodeError as error:
        raise _BadFileError("it has a name that is no text") from error


def _entry(reader: _Reader, name: str) -> LegacyEntry:
    n_calls, n_values = reader.integer(), reader.integer()
    if n_values < 1 or n_calls < 0:
        raise _BadFileError(f"its entry {name!r:.80} has {n_values} values from {n_calls} calls")
    values = np.frombuffer(reader.take(n_values * 4), dtype="<f4").astype(np.float32)
    if not np.isfinite(values).all() or values.min() < 0:
        raise _BadFileError(f"its entry {name!r:.80} has values that are not finite or negative")
    return LegacyEntry(values, n_calls)


def _trailer(reader: _Reader) -> tuple[int, str]:
    """Number of chunks and name of the text; the oldest files have neither, so a broken trailer is no error."""
    chunk_count = reader.integer() if reader.left >= 4 else 0
    length = reader.integer() if reader.left >= 4 else 0
    dataset = reader.take(length).decode("utf-8", "replace") if 0 < length <= reader.left else ""
    return max(chunk_count, 0), dataset
