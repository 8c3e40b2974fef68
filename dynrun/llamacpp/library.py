"""ctypes for the parts of ggml that the bindings leave out, with a self-check of the struct layout at load.

Declarations follow ggml/include/ggml.h, ggml-backend.h of the pinned llama.cpp.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynrun.errors import DynrunError
from dynrun.gguf.tensor_types import TYPE_OF_ID, TensorType
from dynrun.llamacpp.build import installation

MAX_DIMS, MAX_SRC, MAX_NAME, OP_PARAMS = 4, 10, 64, 16


class GgmlTensor(ctypes.Structure):
    """struct ggml_tensor (ggml.h); 336 bytes on 64-bit machines."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * MAX_DIMS),
        ("nb", ctypes.c_size_t * MAX_DIMS),
        ("op", ctypes.c_int32),
        ("op_params", ctypes.c_int32 * OP_PARAMS),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * MAX_SRC),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * MAX_NAME),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_VOID, _SIZE, _INT, _I64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_quantize_chunk": (_SIZE, (_INT, _VOID, _VOID, _I64, _I64, _I64, _VOID)),
    "ggml_quantize_init": (None, (_INT,)),
    "ggml_quantize_requires_imatrix": (ctypes.c_bool, (_INT,)),
    "ggml_row_size": (_SIZE, (_INT, _I64)),
    "ggml_get_type_traits": (_VOID, (_INT,)),
    "ggml_type_name": (ctypes.c_char_p, (_INT,)),
    "ggml_op_name": (ctypes.c_char_p, (_INT,)),
    "ggml_nbytes": (_SIZE, (_VOID,)),
    "ggml_tensor_overhead": (_SIZE, ()),
    "ggml_backend_tensor_get": (None, (_VOID, _VOID, _SIZE, _SIZE)),
    "ggml_backend_tensor_set": (None, (_VOID, _VOID, _SIZE, _SIZE)),
    "ggml_init": (_VOID, (_InitParams,)),
    "ggml_free": (None, (_VOID,)),
    "ggml_new_tensor_2d": (_VOID, (_VOID, _INT, _I64, _I64)),
    "ggml_set_name": (_VOID, (_VOID, ctypes.c_char_p)),
    "ggml_mul_mat": (_VOID, (_VOID, _VOID, _VOID)),
}


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits (ggml.h)."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class Ggml:
    """The functions of libggml-base used here; make it with :func:`ggml`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.ops = self._operations()
        self._check_layout()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        # Only for the type checker: every function above is set in __init__.
        raise AttributeError(name)

    def _operations(self) -> dict[str, int]:
        """Operation numbers by name: the enum moves between versions, its names do not."""
        names: dict[str, int] = {}
        for number in range(256):
            name = self.ggml_op_name(number)
            # The name table ends with GGML_OP_COUNT entries; GLU is the last operation of ggml.h.
            names.setdefault(name.decode(), number)
            if name == b"GLU":
                return names
        raise DynrunError("libggml-base has no operation GLU", fix="run python3 build.py --clean")

    def _check_layout(self) -> None:
        """Build a real graph node and read it back through :class:`GgmlTensor`."""
        context = self.ggml_init(_InitParams(1 << 16, None, True))
        try:
            weight = self.ggml_new_tensor_2d(context, 0, 32, 3)
            values = self.ggml_new_tensor_2d(context, 0, 32, 5)
            self.ggml_set_name(weight, b"layout.check")
            node = GgmlTensor.from_address(self.ggml_mul_mat(context, weight, values))
            seen = GgmlTensor.from_address(weight)
            right = (
                ctypes.sizeof(GgmlTensor) <= self.ggml_tensor_overhead()
                and seen.name == b"layout.check"
                and list(seen.ne) == [32, 3, 1, 1]
                and list(seen.nb)[:2] == [4, 128]
                and list(node.ne) == [3, 5, 1, 1]
                and node.op == self.ops["MUL_MAT"]
                and list(node.src)[:3] == [weight, values, None]
            )
        finally:
            self.ggml_free(context)
        if not right:
            raise DynrunError(
                "the compiled llama.cpp has another struct ggml_tensor than this version of dynrun expects",
                fix="run python3 build.py --clean",
            )

    def quantize(
        self, type_id: int, rows: npt.NDArray[np.float32], imatrix: npt.NDArray[np.float32] | None
    ) -> npt.NDArray[np.uint8]:
        """Quantize ``rows`` [n_rows, n_per_row] by ggml_quantize_chunk; ``imatrix`` [n_per_row] or None.

        Raises ValueError for what ggml would abort on, or read past the end of.
        """
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        if rows.ndim != 2:
            raise ValueError(f"rows of {rows.ndim} dimensions")
        n_rows, n_per_row = rows.shape
        kind = _kind(type_id, n_per_row)
        weights = None if imatrix is None else np.ascontiguousarray(imatrix, dtype=np.float32)
        if weights is None and self.ggml_quantize_requires_imatrix(type_id):
            raise ValueError(f"{kind.name} needs an imatrix")
        if weights is not None and weights.shape != (n_per_row,):
            raise ValueError(f"an imatrix of {weights.shape} for rows of {n_per_row}")
        if not np.isfinite(rows).all() or not (weights is None or np.isfinite(weights).all()):
            raise ValueError(f"values that are not finite cannot be {kind.name}")
        out = np.empty(n_rows * self.ggml_row_size(type_id, n_per_row), dtype=np.uint8)
        pointer = None if weights is None else weights.ctypes.data
        written = self.ggml_quantize_chunk(type_id, rows.ctypes.data, out.ctypes.data, 0, n_rows, n_per_row, pointer)
        if written != out.size:
            raise DynrunError(f"ggml_quantize_chunk wrote {written} of {out.size} bytes")
        return out

    def dequantize(
        self, type_id: int, data: npt.NDArray[np.uint8], n_rows: int, n_per_row: int
    ) -> npt.NDArray[np.float32]:
        """Values of quantized ``data`` as float32 [n_rows, n_per_row], by the type's own to_float.

        Raises ValueError for another number of bytes than they take, and for a type that has no to_float.
        """
        kind, data = _kind(type_id, n_per_row), np.ascontiguousarray(data)
        if data.nbytes != kind.nbytes(n_rows * n_per_row):
            raise ValueError(f"{data.nbytes} bytes for {n_rows} rows of {n_per_row} in {kind.name}")
        out = np.empty((n_rows, n_per_row), dtype=np.float32)
        traits = _TypeTraits.from_address(self.ggml_get_type_traits(type_id))
        if not traits.to_float:
            raise ValueError(f"{kind.name} is not quantized")
        _TO_FLOAT(traits.to_float)(data.ctypes.data, out.ctypes.data, out.size)
        return out

    def round_trip(
        self, type_id: int, rows: npt.NDArray[np.float32], imatrix: npt.NDArray[np.float32] | None
    ) -> npt.NDArray[np.float32]:
        """``rows`` quantized as by :meth:`quantize`, and back."""
        return self.dequantize(type_id, self.quantize(type_id, rows, imatrix), *rows.shape)

    def tensor_bytes(self, pointer: int) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor on any backend."""
        out = np.empty(self.ggml_nbytes(pointer), dtype=np.uint8)
        self.ggml_backend_tensor_get(pointer, out.ctypes.data, 0, out.size)
        return out

    def set_tensor_bytes(self, pointer: int, data: npt.NDArray[Any]) -> None:
        """Overwrite a tensor on any backend. Raises ValueError if ``data`` has another size."""
        data = np.ascontiguousarray(data)
        if data.dtype.hasobject:
            raise ValueError("pointers for a tensor")
        if data.nbytes != self.ggml_nbytes(pointer):
            raise ValueError(f"{data.nbytes} bytes for a tensor of {self.ggml_nbytes(pointer)}")
        self.ggml_backend_tensor_set(pointer, data.ctypes.data, 0, data.nbytes)


def _kind(type_id: int, n_per_row: int) -> TensorType:
    """The type with that number. Raises ValueError for none, and for rows that are no whole blocks of it."""
    kind = TYPE_OF_ID.get(type_id)
    if kind is None:
        raise ValueError(f"no tensor type has the number {type_id}")
    if n_per_row < 1 or not kind.fits(n_per_row):
        raise ValueError(f"rows of {n_per_row} values in {kind.name}, whose blocks have {kind.block_size}")
    return kind


def shared_library(folder: Path, name: str) -> Path:
    """The file of shared library ``name`` in a build's folder. Raises DynrunError where it is missing."""
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    path = folder / (f"{name}{suffix}" if sys.platform == "win32" else f"lib{name}{suffix}")
    if not path.exists():
        raise DynrunError(f"{path} is missing", fix="run python3 build.py")
    return path


def _wait_passively() -> None:
    """Have idle OpenMP threads sleep: threads that spin at every barrier halve each other's speed, and worse, as soon
    as anything else runs on the machine. To be set before libgomp is loaded."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@cache
def ggml() -> Ggml:
    """Load libggml-base of the installed build, once, and check it."""
    _wait_passively()
    return Ggml(ctypes.CDLL(str(shared_library(installation().bin, "ggml-base"))))


@cache
def llama() -> Any:
    """The module ``llama_cpp`` on the installed build's libraries (imported here: it loads them at import)."""
    _wait_passively()
    os.environ["LLAMA_CPP_LIB_PATH"] = str(installation().bin)
    shared_library(installation().bin, "llama")
    from llama_cpp import llama_cpp as module

    module.llama_backend_init()
    return module
