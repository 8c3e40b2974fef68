"""A quantized GGUF as one of full precision: what can be measured against where no better file of a model is to be had.

The values are the quantized file's own, to the rounding of F16, so everything that is measured is measured against that
file, not against the model it was made from. Metadata is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynrun.artifacts import StageFolder, key_of, run_stage, sha256_file
from dynrun.convert.environment import Say
from dynrun.errors import UsageError
from dynrun.gguf.header import Header, TensorInfo, read_header
from dynrun.gguf.rewrite import rewrite
from dynrun.gguf.shards import COUNT
from dynrun.gguf.tensor_types import FULL_PRECISION, TENSOR_TYPES
from dynrun.gguf.weights import encode
from dynrun.llamacpp.library import ggml
from dynrun.paths import models_dir

_ROWS_BYTES = 1 << 26
_MOST_F16 = 65504.0
_REVISION = 1


def dequantized(path: Path, say: Say) -> Path:
    """The GGUF at ``path`` with every quantized tensor as F16 (F32 where its values are too large), made or found.

    Raises UsageError for a split file.
    """
    header = read_header(path)
    if header.metadata.get(COUNT, 1) != 1:
        raise UsageError(f"{path} is a quantized file in shards", fix="join them with llama-gguf-split --merge first")
    inputs = {"file": sha256_file(path), "revision": _REVISION}
    key = key_of(inputs)
    folder = StageFolder("dequantize", key, models_dir() / "converted" / key, inputs)
    name = f"{path.stem}-as-F16.gguf"

    def work(stage: StageFolder) -> Mapping[str, Any]:
        say(f"unpacking {path} to F16, as it is quantized")
        coarse = {n: t for n, t in header.tensors.items() if t.type not in FULL_PRECISION}
        source = np.memmap(path, dtype=np.uint8, mode="r")
        types = {n: _type_for(source, header, t) for n, t in coarse.items()}

        def data_of(name: str) -> npt.NDArray[np.uint8]:
            parts = [encode(rows, types[name]) for rows in _rows(source, header, coarse[name])]
            return np.concatenate(parts)

        rewrite(header, stage / name, types, data_of)
        return {}

    run_stage(folder, work)
    return folder / name


def _type_for(source: npt.NDArray[np.uint8], header: Header, tensor: TensorInfo) -> str:
    largest = max(float(np.abs(rows).max()) for rows in _rows(source, header, tensor))
    return "F16" if largest <= _MOST_F16 else "F32"


def _rows(source: npt.NDArray[np.uint8], header: Header, tensor: TensorInfo) -> Iterator[npt.NDArray[np.float32]]:
    """The tensor's values, some rows at a time."""
    library, kind, width = ggml(), TENSOR_TYPES[tensor.type], tensor.shape[0]
    row_bytes, n_rows = kind.nbytes(width), tensor.n_elements // width
    start, step = header.data_offset + tensor.offset, max(1, _ROWS_BYTES // (4 * width))
    for first in range(0, n_rows, step):
        n = min(step, n_rows - first)
        begin = start + first * row_bytes
        data = np.ascontiguousarray(source[begin : begin + n * row_bytes])
        yield library.dequantize(kind.ggml_id, data, n, width)
