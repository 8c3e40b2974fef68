"""The error of a tensor type on a tensor: Σ s·(w−q)² / Σ s·w², s the sum of x² over the entry's input column.

For a dense tensor this is the weighting that llama-quantize minimizes, the mean of x² (quantize_row_*_impl in
ggml/src/ggml-quants.c). Experts of one tensor are summed by their share of the tokens: the sums of x² hold it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynrun.calibration.imatrix import Imatrix
from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp.library import ggml

Rows = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_CHUNK_ROWS = 256


@dataclass(frozen=True)
class Replacement:
    """A tensor's values in a type, [n_rows, ne0] float32, and the error."""

    values: Rows
    error: float


@dataclass(frozen=True)
class TypeErrors:
    """``errors``: of each type; ``spread``: the largest relative standard error among them, from sampling rows;
    ``energy``: Σ mean(x²)·w² over the whole tensor, which turns an error into a squared error of the output."""

    errors: dict[str, float]
    spread: float
    energy: float


class Quantizer:
    """Quantizes tensors of one reference as llama-quantize would, with its imatrix, on several threads."""

    def __init__(self, weights: WeightFile, imatrix: Imatrix, n_threads: int) -> None:
        self.weights, self.imatrix = weights, imatrix
        self._pool = ThreadPoolExecutor(n_threads)
        self._ggml = ggml()

    def replacement(self, name: str, type_name: str) -> Replacement:
        """All of tensor ``name`` quantized to ``type_name`` and back."""
        values = self.weights.rows(name)
        importance, shares = self._importance(name)
        per_expert = len(values) // len(importance)

        def work(start: int) -> tuple[float, float]:
            expert = start // per_expert
            stop = min(start + _CHUNK_ROWS, (expert + 1) * per_expert)
            original = values[start:stop]
            quantized = self._round_trip(type_name, original, importance[expert], self._given(name))
            lost, whole = _weighted(original, quantized, importance[expert])
            values[start:stop] = quantized
            return float(lost.sum()) * shares[expert], float(whole.sum()) * shares[expert]

        starts = [s for e in range(len(importance)) for s in range(e * per_expert, (e + 1) * per_expert, _CHUNK_ROWS)]
        self._ggml.ggml_quantize_init(TENSOR_TYPES[type_name].ggml_id)
        lost, whole = np.sum(list(self._pool.map(work, starts)), axis=0)
        return Replacement(values, float(lost / whole) if whole > 0 else 0.0)

    def errors(self, name: str, types: Iterable[str], n_samples: int) -> TypeErrors:
        """The error of each type, from about ``n_samples`` rows drawn in proportion to their part of Σ s·w².

        A row's relative error varies little, so its mean over such a draw is the tensor's error; rows that hold much
        (those that write massive activations hold nearly all) are met as often as they count. Systematic sampling:
        every row where all are asked for, no random numbers.
        """
        importance, shares = self._importance(name)
        sample = self._sample(name, importance, shares, n_samples)
        rows = sample.rows
        per_expert = self.weights.n_rows(name) // len(importance)
        experts = rows // per_expert
        groups = [np.flatnonzero(experts == e) for e in np.unique(experts)]
        values = self.weights.rows(name, rows)

        def work(type_name: str) -> tuple[str, float, float]:
            self._ggml.ggml_quantize_init(TENSOR_TYPES[type_name].ggml_id)
            relative: Floats = np.zeros(len(rows))
            for group in groups:
                h = importance[experts[group[0]]]
                quantized = self._round_trip(type_name, values[group], h, self._given(name))
                lost, whole = _weighted(values[group], quantized, h)
                relative[group] = np.divide(lost, whole, out=np.zeros_like(lost), where=whole > 0)
            return type_name, *sample.mean_and_spread(relative)

        found = list(self._pool.map(work, types))
        spread = max((spread for _, _, spread in found), default=0.0)
        return TypeErrors({type_name: error for type_name, error, _ in found}, spread, sample.energy)

    def some_rows(self, name: str, type_name: str, n: int) -> Iterator[tuple[int, Rows, Rows]]:
        """Of each expert (0 of a dense tensor) up to ``n`` rows over all, evenly spaced, as they are and in a type."""
        importance, _ = self._importance(name)
        per_expert = self.weights.n_rows(name) // len(importance)
        each = min(per_expert, max(8, n // len(importance)))
        offsets = ((np.arange(each) + 0.5) * per_expert / each).astype(np.int64)
        self._ggml.ggml_quantize_init(TENSOR_TYPES[type_name].ggml_id)
        for expert, h in enumerate(importance):
            rows = self.weights.rows(name, expert * per_expert + offsets)
            yield expert, rows, self._round_trip(type_name, rows, h, self._given(name))

    def _sample(self, name: str, importance: Rows, shares: Sequence[float], n: int) -> _Sample:
        """Rows of the tensor to look at, at most ``n``."""
        n_rows = self.weights.n_rows(name)
        per_expert = n_rows // len(importance)

        def energies(start: int) -> Floats:
            expert = start // per_expert
            stop = min(start + _CHUNK_ROWS, (expert + 1) * per_expert)
            values = self.weights.rows(name, slice(start, stop))
            found: Floats = (np.square(values) @ importance[expert]).astype(np.float64) * shares[expert]
            return found

        starts = [s for e in range(len(importance)) for s in range(e * per_expert, (e + 1) * per_expert, _CHUNK_ROWS)]
        energy = np.concatenate(list(self._pool.map(energies, starts)))
        return _drawn(energy, n)

    def _given(self, name: str) -> bool:
        return name in self.imatrix.sums

    def _importance(self, name: str) -> tuple[Rows, list[float]]:
        """Mean of x² [n_expert, ne0], and the share of the tokens that each expert has."""
        mean = self.imatrix.mean(name)
        if mean is None:
            shape = self.weights.header.tensors[name].shape
            n_expert = math.prod(shape[2:])
            return np.ones((n_expert, shape[0]), dtype=np.float32), [1 / n_expert] * n_expert
        counts = np.maximum(self.imatrix.counts[name], 0.0)
        # Experts that saw nothing count for nothing, unless none saw anything.
        shares = counts / counts.sum() if counts.sum() > 0 else np.full(len(counts), 1 / len(counts))
        return mean.astype(np.float32), [float(share) for share in shares]

    def _round_trip(self, type_name: str, rows: Rows, importance: Rows, given: bool) -> Rows:
        if type_name == "F16":
            return rows.astype(np.float16).astype(np.float32)
        type_id = TENSOR_TYPES[type_name].ggml_id
        return self._ggml.round_trip(type_id, rows, importance if given else None)


def _weighted(original: Rows, quantized: Rows, importance: Rows) -> tuple[Floats, Floats]:
    """Per row: Σ h·(w−q)² and Σ h·w²."""
    h = importance.astype(np.float64)
    return np.square(original.astype(np.float64) - quantized) @ h, np.square(original.astype(np.float64)) @ h


@dataclass(frozen=True)
class _Sample:
    """Numbers of rows, the weight of each in the mean, which of them are drawn for others too; Σ s·w² of all rows."""

    rows: Ints
    weights: Floats
    drawn: npt.NDArray[np.bool_]
    energy: float

    def mean_and_spread(self, relative: Floats) -> tuple[float, float]:
        """The weighted mean of the rows' errors, and its standard error over it. Rows that stand for none but
        themselves add nothing to it."""
        mean = float(relative @ self.weights)
        weights, values = self.weights[self.drawn], relative[self.drawn]
        share = float(weights.sum())
        if mean <= 0 or share <= 0:
            return mean, 0.0
        around = float(np.square(values - float(values @ weights) / share) @ weights) / share
        # Kish's effective number of rows: share² / Σ weights².
        return mean, math.sqrt(around * float(np.square(weights).sum())) / mean


def _drawn(energy: Floats, n: int) -> _Sample:
    """Every row that holds a part of 1/n or more, and for the others as many as are left of ``n``."""
    total = float(energy.sum())
    if len(energy) <= n or total <= 0:
        weights = energy / total if total > 0 else np.full(len(energy), 1 / len(energy))
        return _Sample(np.arange(len(energy)), weights, np.zeros(len(energy), dtype=np.bool_), total)
    certain = np.flatnonzero(energy * n >= total)
    rest = energy.copy()
    rest[certain] = 0.0
    left, n_left = float(rest.sum()), max(n - len(certain), n // 4)
    points = (np.arange(n_left) + 0.5) * left / n_left
    drawn, counts = np.unique(np.minimum(np.searchsorted(np.cumsum(rest), points), len(rest) - 1), return_counts=True)
    rows = np.concatenate([certain, drawn])
    weights = np.concatenate([energy[certain] / total, counts / n_left * left / total])
    order = np.argsort(rows, kind="stable")
    is_drawn = np.concatenate([np.zeros(len(certain), dtype=np.bool_), np.ones(len(drawn), dtype=np.bool_)])
    return _Sample(rows[order], weights[order], is_drawn[order], total)
