"""Read the header of a GGUF: metadata, tensor infos, where the data lies.

Takes a file, or a function that reads ranges of one that is elsewhere; gives a :class:`Header`; nothing of the weights
is read. Every count and length in the file is checked against the file's size before it is believed, and all of it
against budgets, so that a hostile file costs bounded memory and time. Format: docs/gguf.md of ggml; ggml/src/gguf.cpp.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dynrun.errors import DynrunError, NotFoundError
from dynrun.gguf.tensor_types import TYPE_OF_ID

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
# Bytes read at once: few at first, as the header of a shard is small, and twice as many each time.
_FIRST_WINDOW, _LAST_WINDOW = 1 << 18, 1 << 21
_MAX_NESTING = 4
# Far above any model (a vocabulary has under a million entries), far below what a hostile file could ask for.
_MAX_STRING, _MAX_ARRAY = 1 << 26, 1 << 24
# Of the whole header: bytes, values in arrays (a large vocabulary and its merges are two million), entries, tensors.
_MAX_BYTES, _MAX_VALUES, _MAX_ENTRIES, _MAX_TENSORS = 1 << 27, 1 << 22, 1 << 16, 1 << 18
# A file written so lately may be written again within the same tick of its time stamps.
_UNSETTLED_S = 2.0
# Bytes [offset, offset + length) of a file, fewer at its end.
Read = Callable[[int, int], bytes]
DEFAULT_ALIGNMENT = 32
# What differs between quants of one model.
_OF_A_QUANT = frozenset({"general.file_type", "general.quantization_version"})
PREAMBLE_BYTES = 24  # magic, version, number of tensors, number of entries


@dataclass(frozen=True)
class TensorInfo:
    """``shape`` in ggml order [ne0, ne1, ...] without trailing ones; ``offset`` from the start of the data."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def n_elements(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n


@dataclass(frozen=True)
class Header:
    """``kv_bytes``: the size in bytes of each metadata entry as it lies in the file, key included."""

    path: Path
    metadata: Mapping[str, Any]
    kv_bytes: Mapping[str, int]
    tensors: Mapping[str, TensorInfo]
    data_offset: int
    file_bytes: int
    alignment: int

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def n_elements(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.n_elements for tensor in self.tensors.values())

    @property
    def bpw(self) -> float:
        """Bits of the file per element of all tensors; 0 where there are none (a file of a vocabulary)."""
        return self.file_bytes * 8 / self.n_elements if self.tensors else 0.0


def read_header(path: Path) -> Header:
    """The header of the GGUF at ``path``; one that was read before is not parsed again while the file is the same.

    Raises NotFoundError for a missing file, DynrunError for one that is no whole GGUF.
    """
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist", fix="check the path")
    try:
        seen = path.stat()
        if abs(time.time() - seen.st_mtime) < _UNSETTLED_S:
            return _from_disk(path, seen.st_size)
        return _remembered(path, seen.st_size, (seen.st_dev, seen.st_ino, seen.st_mtime_ns, seen.st_ctime_ns))
    except OSError as error:
        raise DynrunError(f"{path} cannot be read: {error.strerror}", fix="check its permissions") from error


# Of a large vocabulary one takes tens of megabytes.
@lru_cache(maxsize=4)
def _remembered(path: Path, size: int, _identity: tuple[int, ...]) -> Header:
    return _from_disk(path, size)


def _from_disk(path: Path, size: int) -> Header:
    with path.open("rb") as stream:

        def read(offset: int, length: int) -> bytes:
            stream.seek(offset)
            return stream.read(length)

        return parse_header(path, read, size)


def parse_header(path: Path, read: Read, size: int) -> Header:
    """The header of a GGUF of ``size`` bytes that is called ``path``, wherever it is; ``read`` gives ranges of it.

    Raises DynrunError where it is no whole GGUF, and whatever ``read`` raises.
    """
    try:
        return _parse(path, _Reader(read, size))
    except _BadFileError as error:
        raise DynrunError(f"{path} is not a whole GGUF: {error}", fix="download or make it again") from error


def parse_sibling(path: Path, read: Read, size: int, donor: Header) -> Header | None:
    """The header of another quant of ``donor``'s model, whose metadata take megabytes and need not be read again.

    Its tensor infos are looked for where the donor's begin, and must name the same tensors in the same shapes; None
    where they do not. The metadata are the donor's, without what tells quants apart. Raises what ``read`` raises.
    """
    reader = _Reader(read, size)
    try:
        _, n_tensors, n_kv = _preamble(reader)
        if (n_tensors, n_kv) != (len(donor.tensors), len(donor.kv_bytes)):
            return None
        # A reader that begins behind the metadata.
        reader = _Reader(read, size, PREAMBLE_BYTES + sum(donor.kv_bytes.values()))
        tensors = _tensors(reader, n_tensors, donor.alignment)
        data_offset = _data_offset(reader, tensors, donor.alignment)
    except _BadFileError:
        return None
    if [(t.name, t.shape) for t in tensors.values()] != [(t.name, t.shape) for t in donor.tensors.values()]:
        return None
    metadata = {key: value for key, value in donor.metadata.items() if key not in _OF_A_QUANT}
    return Header(path, metadata, donor.kv_bytes, tensors, data_offset, size, donor.alignment)


class _BadFileError(Exception):
    pass


class _Reader:
    """Sequential reads through a window; raises _BadFileError past the end and past the budgets."""

    def __init__(self, read: Read, size: int, start: int = 0) -> None:
        self.read, self.size = read, size
        self.window, self.start, self.at = b"", min(start, size), 0
        self.ahead, self.n_values = _FIRST_WINDOW, 0

    @property
    def position(self) -> int:
        return self.start + self.at

    @property
    def left(self) -> int:
        return self.size - self.position

    def take(self, n: int) -> bytes:
        if n > self.left:
            raise _BadFileError("it ends in the middle of its header")
        if self.at + n > len(self.window):
            self._advance(n)
        data = self.window[self.at : self.at + n]
        self.at += n
        return data

    def _advance(self, n: int) -> None:
        if self.position + n > _MAX_BYTES:
            raise _BadFileError(f"its header has more than {_MAX_BYTES >> 20} MiB")
        rest = self.window[self.at :]
        self.start, self.at = self.position, 0
        begin = self.start + len(rest)
        self.window = rest + self.read(begin, min(max(n - len(rest), self.ahead), self.size - begin))
        self.ahead = min(self.ahead * 2, _LAST_WINDOW)
        if len(self.window) < n:
            raise _BadFileError("it became shorter while it was read")

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        n = self.scalar("<Q")
        if n > min(self.left, _MAX_STRING):
            raise _BadFileError(f"a text of {n} bytes in the {self.left} bytes that are left")
        return self.take(n).decode("utf-8", "replace")

    def _strings(self, n: int) -> list[str]:
        """``n`` strings; those in the window without a call for each, as a vocabulary has hundreds of thousands."""
        found: list[str] = []
        length_at = struct.Struct("<Q").unpack_from
        while len(found) < n:
            window, at, end = self.window, self.at, len(self.window)
            for _ in range(n - len(found)):
                if at + 8 > end or (stop := at + 8 + length_at(window, at)[0]) > end:
                    break
                found.append(window[at + 8 : stop].decode("utf-8", "replace"))
                at = stop
            self.at = at
            if len(found) < n:
                # The next one crosses the window's end.
                found.append(self.string())
        return found

    def value(self, kind: int, nesting: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or nesting > _MAX_NESTING:
            raise _BadFileError(f"a metadata value of unknown type {kind}")
        of, n = self.scalar("<I"), self.scalar("<Q")
        smallest = struct.calcsize(_SCALARS[of]) if of in _SCALARS else 8
        if n > _MAX_ARRAY or n * smallest > self.left:
            raise _BadFileError(f"an array of {n} values in the {self.left} bytes that are left")
        self.n_values += n
        if self.n_values > _MAX_VALUES:
            raise _BadFileError(f"its arrays have more than {_MAX_VALUES} values")
        if of in _SCALARS:
            return list(struct.unpack(f"<{n}{_SCALARS[of][1]}", self.take(n * smallest)))
        if of == _STRING:
            return self._strings(n)
        return [self.value(of, nesting + 1) for _ in range(n)]


def _parse(path: Path, reader: _Reader) -> Header:
    _, n_tensors, n_kv = _preamble(reader)
    metadata, kv_bytes = _metadata(reader, n_kv)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise _BadFileError(f"an alignment of {alignment!r:.80}")
    tensors = _tensors(reader, n_tensors, alignment)
    data_offset = _data_offset(reader, tensors, alignment)
    return Header(path, metadata, kv_bytes, tensors, data_offset, reader.size, alignment)


def _preamble(reader: _Reader) -> tuple[int, int, int]:
    """Version, number of tensors, number of metadata entries."""
    if reader.left < PREAMBLE_BYTES or reader.take(4) != b"GGUF":
        raise _BadFileError("it does not begin with GGUF")
    version = reader.scalar("<I")
    if version not in (2, 3):
        raise _BadFileError(f"version {version}; versions 2 and 3 are known")
    n_tensors, n_kv = reader.scalar("<Q"), reader.scalar("<Q")
    # The smallest entry: an empty key and a one-byte value; an empty name and no dimensions.
    if n_kv * 13 + n_tensors * 24 > reader.left:
        raise _BadFileError(f"{n_kv} metadata entries and {n_tensors} tensors in {reader.size} bytes")
    if n_kv > _MAX_ENTRIES or n_tensors > _MAX_TENSORS:
        raise _BadFileError(f"{n_kv} metadata entries and {n_tensors} tensors are more than any model has")
    return version, n_tensors, n_kv


def _data_offset(reader: _Reader, tensors: Mapping[str, TensorInfo], alignment: int) -> int:
    """Where the data begin, behind the tensor infos that ``reader`` has read."""
    data_offset = padded(reader.position, alignment)
    for tensor in tensors.values():
        if data_offset + tensor.offset + tensor.nbytes > reader.size:
            raise _BadFileError(f"it is truncated: {tensor.name!r:.80} ends past the end of the file")
    return data_offset


def _metadata(reader: _Reader, n: int) -> tuple[dict[str, Any], dict[str, int]]:
    metadata: dict[str, Any] = {}
    kv_bytes: dict[str, int] = {}
    for _ in range(n):
        begin = reader.position
        key = reader.string()
        if key in metadata:
            raise _BadFileError(f"it has the key {key!r:.80} twice")
        metadata[key] = reader.value(reader.scalar("<I"))
        kv_bytes[key] = reader.position - begin
    return metadata, kv_bytes


def _tensors(reader: _Reader, n: int, alignment: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for _ in range(n):
        tensor = _tensor(reader)
        if tensor.name in tensors:
            raise _BadFileError(f"it has the tensor {tensor.name!r:.80} twice")
        if tensor.offset % alignment:
            raise _BadFileError(f"tensor {tensor.name!r:.80} is not aligned to {alignment} bytes")
        tensors[tensor.name] = tensor
    return tensors


def _tensor(reader: _Reader) -> TensorInfo:
    name, n_dims = reader.string(), reader.scalar("<I")
    if not 1 <= n_dims <= 4:
        raise _BadFileError(f"tensor {name!r:.80} has {n_dims} dimensions")
    shape = [reader.scalar("<Q") for _ in range(n_dims)]
    type_id, offset = reader.scalar("<I"), reader.scalar("<Q")
    if type_id not in TYPE_OF_ID:
        raise _BadFileError(f"tensor {name!r:.80} is of unknown type {type_id}")
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    kind, n = TYPE_OF_ID[type_id], 1
    for size in shape:
        n *= size
    if not 0 < n < 1 << 60 or not kind.fits(shape[0]):
        raise _BadFileError(f"tensor {name!r:.80} of type {kind.name} has shape {shape}")
    return TensorInfo(name, kind.name, tuple(shape), offset, kind.nbytes(n))


def padded(n: int, alignment: int) -> int:
    """``n`` rounded up to a multiple of ``alignment``."""
    return -(-n // alignment) * alignment
