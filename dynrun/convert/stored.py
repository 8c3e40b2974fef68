"""Read the headers of safetensors files: names, types, shapes, where the data lies.

Nothing of the weights is read, nothing is executed, every length is checked against the file before it is believed.
Format: https://github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrun.errors import MALFORMED, DynrunError

# Bytes of an element; F4 and the 6-bit types take less than one, and are told by their offsets.
DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_DIMS = 8


@dataclass(frozen=True)
class StoredTensor:
    """``shape`` as PyTorch has it, rows first; ``dtype`` as the file names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


def read_stored(path: Path) -> dict[str, StoredTensor]:
    """The tensors of the safetensors file at ``path``. Raises DynrunError for one that is not whole."""
    try:
        return _read(path)
    except _BadFileError as error:
        raise DynrunError(
            f"{path} is not a whole safetensors file: {error}", fix="download it again, and nothing else"
        ) from error
    except OSError as error:
        raise DynrunError(f"{path} cannot be read: {error.strerror}", fix="check its permissions") from error


class _BadFileError(Exception):
    pass


def _read(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise _BadFileError(f"a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise _BadFileError(f"its header is no JSON ({str(error)[:80]})") from error
    if not isinstance(header, dict):
        raise _BadFileError("its header is no JSON object")
    header.pop("__metadata__", None)
    found, spans = {}, []
    for name, entry in header.items():
        found[name], span = _tensor(name, entry)
        spans.append(span)
    end = 0
    for begin, until in sorted(spans):
        if begin != end:
            raise _BadFileError("its tensors overlap or leave holes")
        end = until
    if end != size - 8 - length:
        raise _BadFileError(f"its tensors have {end} bytes where the file holds {size - 8 - length}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _tensor(name: str, entry: Any) -> tuple[StoredTensor, tuple[int, int]]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except MALFORMED as error:
        raise _BadFileError(f"tensor {name!r:.80} has no type, shape and place") from error
    numbers = (*shape, begin, end) if isinstance(shape, list) and len(shape) <= _MAX_DIMS else (-1,)
    if not isinstance(dtype, str) or any(type(n) is not int or not 0 <= n < 1 << 60 for n in numbers):
        raise _BadFileError(f"tensor {name!r:.80} has an impossible shape or place")
    known = DTYPE_BYTES.get(dtype)
    if end < begin or (known is not None and end - begin != math.prod(shape) * known):
        raise _BadFileError(f"tensor {name!r:.80} of {dtype!r:.20} and shape {shape} has {end - begin} bytes")
    return StoredTensor(name, dtype, tuple(shape), end - begin), (begin, end)
