"""Write a GGUF again with other data, of other types, in some of its tensors.

Metadata is copied as the bytes it is, tensors keep their order; nothing is checked about what the new data mean.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from dynrun.artifacts import atomic_path
from dynrun.errors import DynrunError
from dynrun.gguf.header import PREAMBLE_BYTES, Header, TensorInfo, padded
from dynrun.gguf.tensor_types import TENSOR_TYPES

_COPIED_BYTES = 1 << 24


def rewrite(
    source: Header, path: Path, types: Mapping[str, str], data_of: Callable[[str], npt.NDArray[np.uint8]]
) -> None:
    """Write ``path``: the file of ``source``, with the tensors named in ``types`` of these types.

    ``data_of(name)`` gives the bytes of each of those when it is its turn. Raises DynrunError where they are not as
    many as the type has.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as out, source.path.open("rb") as old:
        _copy(old, 0, PREAMBLE_BYTES + sum(source.kv_bytes.values()), out)
        out.write(_infos(source, types))
        out.write(bytes(padded(out.tell(), source.alignment) - out.tell()))
        for name, tensor in source.tensors.items():
            size = _size(tensor, types)
            if name in types:
                data = np.ascontiguousarray(data_of(name))
                if data.nbytes != size:
                    raise DynrunError(f"{data.nbytes} bytes for {name} of {size} in {types[name]}", fix="report this")
                out.write(data.tobytes())
            else:
                _copy(old, source.data_offset + tensor.offset, size, out)
            out.write(bytes(padded(size, source.alignment) - size))


def _size(tensor: TensorInfo, types: Mapping[str, str]) -> int:
    return TENSOR_TYPES[types.get(tensor.name, tensor.type)].nbytes(tensor.n_elements)


def _infos(source: Header, types: Mapping[str, str]) -> bytes:
    parts, offset = [], 0
    for name, tensor in source.tensors.items():
        kind, encoded = TENSOR_TYPES[types.get(name, tensor.type)], name.encode()
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        parts.append(struct.pack("<Q", len(encoded)) + encoded + shape + struct.pack("<IQ", kind.ggml_id, offset))
        offset += padded(_size(tensor, types), source.alignment)
    return b"".join(parts)


def _copy(old: BinaryIO, start: int, size: int, out: BinaryIO) -> None:
    old.seek(start)
    while size > 0:
        part = old.read(min(size, _COPIED_BYTES))
        if not part:
            raise DynrunError(f"{old.name} became shorter while it was read", fix="run the same command again")
        out.write(part)
        size -= len(part)
