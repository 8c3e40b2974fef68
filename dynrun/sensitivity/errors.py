"""The error of a tensor type on a tensor: Σ h·(w−q)² / Σ h·w², h the mean of x² of the entry's input column."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynrun.calibration.imatrix import Imatrix
from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp.library import ggml

Rows = npt.NDArray[np.float32]
_CHUNK_ROWS = 256


@dataclass(frozen=True)
class Replacement:
    """A tensor's values in a type, [n_rows, ne0] float32, and the error."""

    values: Rows
    error: float


class Quantizer:
    """Quantizes tensors of one reference as llama-quantize would, with its imatrix, on several threads."""

    def __init__(self, weights: WeightFile, imatrix: Imatrix, n_threads: int) -> None:
        self.weights, self.imatrix = weights, imatrix
        self._pool = ThreadPoolExecutor(n_threads)
        self._ggml = ggml()

    def replacement(self, name: str, type_name: str) -> Replacement:
        """All of tensor ``name`` quantized to ``type_name`` and back."""
        n_rows = self.weights.n_rows(name)
        values = self.weights.rows(name)
        importance = self._importance(name)
        per_expert = n_rows // len(importance)

        def work(start: int) -> tuple[float, float]:
            expert = start // per_expert
            stop = min(start + _CHUNK_ROWS, (expert + 1) * per_expert)
            original = values[start:stop]
            quantized = self._round_trip(type_name, original, importance[expert], self._given(name))
            sums = _weighted(original, quantized, importance[expert])
            values[start:stop] = quantized
            return sums

        starts = [s for e in range(len(importance)) for s in range(e * per_expert, (e + 1) * per_expert, _CHUNK_ROWS)]
        self._ggml.ggml_quantize_init(TENSOR_TYPES[type_name].ggml_id)
        return Replacement(values, _ratio(self._pool.map(work, starts)))

    def errors(self, name: str, types: Iterable[str], max_rows: int) -> dict[str, float]:
        """The error of each type on evenly spaced rows, at most ``max_rows`` (of every expert, at least 2)."""
        importance = self._importance(name)
        n_rows = self.weights.n_rows(name)
        per_expert = n_rows // len(importance)
        each = min(per_expert, max(2, max_rows // len(importance)))
        # The middle of equal strata: no row counts twice and the heads of attention are all met.
        offsets = ((np.arange(each) + 0.5) * per_expert / each).astype(np.int64)
        samples = [self.weights.rows(name, e * per_expert + offsets) for e in range(len(importance))]

        def work(type_name: str) -> tuple[str, float]:
            self._ggml.ggml_quantize_init(TENSOR_TYPES[type_name].ggml_id)
            sums = [
                _weighted(rows, self._round_trip(type_name, rows, h, self._given(name)), h)
                for rows, h in zip(samples, importance, strict=True)
            ]
            return type_name, _ratio(sums)

        return dict(self._pool.map(work, types))

    def _given(self, name: str) -> bool:
        return name in self.imatrix.sums

    def _importance(self, name: str) -> Rows:
        mean = self.imatrix.mean(name)
        if mean is None:
            return np.ones((1, self.weights.header.tensors[name].shape[0]), dtype=np.float32)
        return mean.astype(np.float32)

    def _round_trip(self, type_name: str, rows: Rows, importance: Rows, given: bool) -> Rows:
        if type_name == "F16":
            return rows.astype(np.float16).astype(np.float32)
        type_id = TENSOR_TYPES[type_name].ggml_id
        data = self._ggml.quantize(type_id, rows, importance if given else None)
        return self._ggml.dequantize(type_id, data, *rows.shape)


def _weighted(original: Rows, quantized: Rows, importance: Rows) -> tuple[float, float]:
    h = importance.astype(np.float64)
    lost = np.square(original.astype(np.float64) - quantized) @ h
    whole = np.square(original.astype(np.float64)) @ h
    return float(lost.sum()), float(whole.sum())


def _ratio(sums: Iterable[tuple[float, float]]) -> float:
    lost, whole = np.sum(list(sums), axis=0)
    return float(lost / whole) if whole > 0 else 0.0
