"""Weights of a GGUF as float32 rows, read from the file only where they are needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from dynrun.errors import DynrunError, UsageError
from dynrun.gguf.header import TensorInfo, read_header

Rows = npt.NDArray[np.float32]


class WeightFile:
    """The weights of one GGUF; as float32 those of full precision (F32, F16 or BF16)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")

    def n_rows(self, name: str) -> int:
        """Rows of all matrices of a tensor: ne1 × n_expert."""
        return int(np.prod(self.header.tensors[name].shape[1:], dtype=np.int64))

    def rows(self, name: str, index: slice | npt.NDArray[np.int64] = slice(None), *, finite: bool = True) -> Rows:
        """Rows of ``name`` as float32 [n, ne0]; expert tensors are their experts' rows, one after the other.

        Raises UsageError for a tensor that is already quantized, and unless ``finite`` is false DynrunError for NaN and
        infinity: ggml's quantizers abort on some of them and hide the others.
        """
        found = _as_float32(self.path, self.header.tensors[name], self._raw(name))[index]
        if finite and not np.isfinite(found).all():
            raise DynrunError(
                f"{name} of {self.path} holds values that are not finite", fix="download or make the file again"
            )
        return found

    def row_bytes(self, name: str, begin: int, n: int) -> npt.NDArray[np.uint8]:
        """The bytes of ``n`` rows of a tensor of any type, from row ``begin`` on; a copy."""
        raw = self._raw(name)
        size = raw.size // self.n_rows(name)
        return np.array(raw[begin * size : (begin + n) * size])

    def _raw(self, name: str) -> npt.NDArray[np.uint8]:
        tensor = self.header.tensors[name]
        start = self.header.data_offset + tensor.offset
        return self._bytes[start : start + tensor.nbytes]


def _as_float32(path: Path, tensor: TensorInfo, raw: npt.NDArray[np.uint8]) -> _Lazy:
    dtypes = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    if tensor.type not in dtypes:
        raise UsageError(
            f"{tensor.name} of {path} is already {tensor.type}", fix="start from an F16, BF16 or F32 GGUF of the model"
        )
    return _Lazy(raw.view(dtypes[tensor.type]).reshape(-1, tensor.shape[0]), tensor.type == "BF16")


class _Lazy:
    """Convert only the rows that are asked for."""

    def __init__(self, values: npt.NDArray[np.float32 | np.float16 | np.uint16], bfloat: bool) -> None:
        self.values, self.bfloat = values, bfloat

    def __getitem__(self, index: slice | npt.NDArray[np.int64]) -> Rows:
        chosen = self.values[index]
        if self.bfloat:
            return (chosen.astype(np.uint32) << 16).view(np.float32)
        return np.ascontiguousarray(chosen, dtype=np.float32)


def encode(values: Rows, type_name: str) -> npt.NDArray[np.uint8]:
    """float32 values as the bytes of an F32, F16 or BF16 tensor. Raises UsageError for another type."""
    if type_name == "F32":
        return np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint8)
    if type_name == "F16":
        return np.ascontiguousarray(values, dtype=np.float16).reshape(-1).view(np.uint8)
    if type_name == "BF16":
        bits = np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint32)
        # Round to nearest, ties to even, and keep a NaN one, as ggml_compute_fp32_to_bf16 does.
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return np.where(is_nan, (bits >> 16) | 64, rounded).astype(np.uint16).view(np.uint8)
    raise UsageError(f"cannot write values as {type_name}", fix="start from an F16, BF16 or F32 GGUF of the model")
