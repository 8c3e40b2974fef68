"""Parts of benchmarks/feedback_variants.py: statistics of two models, and scales refitted under the covariance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dynrun.calibration.covariance import HeldOut
from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp.engine import Engine
from dynrun.llamacpp.graph import Activation
from dynrun.llamacpp.library import ggml
from dynrun.rounding.descent import descend
from dynrun.rounding.factor import Factor
from dynrun.rounding.formats import open_codes

Rows = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
_HELD_OUT_EVERY = 8
# Where a block has the half-precision numbers that all its values, or all its offsets, are proportional to
# (ggml-common.h).
_D_AT = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}
_D_MIN_AT = {"Q2_K": 82, "Q4_K": 2, "Q5_K": 2}


class Overlaid(WeightFile):
    """A model's weights, some of them others."""

    def __init__(self, path: Path, others: Mapping[str, Rows]) -> None:
        super().__init__(path)
        self._others = others

    def rows(self, name: str, index: slice | npt.NDArray[np.int64] = slice(None), *, finite: bool = True) -> Rows:
        return self._others[name][index] if name in self._others else super().rows(name, index, finite=finite)


@dataclass
class Means:
    """calibration.covariance.Covariance in memory, of dense weights: Σ x̂x̂ᵀ, and Σ (x − x̂)·x̂ᵀ where two models ran."""

    input_of: Mapping[str, str]
    sums: dict[str, Rows]
    drifts: dict[str, Rows]
    counts: dict[str, int]
    held: dict[str, HeldOut]

    def matrix(self, weight: str, expert: int = 0) -> Rows:
        return self.sums[self.input_of[weight]]

    def drift(self, weight: str) -> Rows:
        return self.drifts[self.input_of[weight]]

    def count(self, weight: str, expert: int = 0) -> int:
        return self.counts[self.input_of[weight]]

    def held_out(self, weight: str, expert: int = 0) -> Rows:
        rows = self.held[self.input_of[weight]].rows[0]
        return rows[~np.isnan(rows[:, 0])]


def summed(
    engine: Engine,
    batches: Sequence[Sequence[Sequence[int]]],
    *,
    also: Engine | None = None,
    weights: Sequence[Rows] | None = None,
) -> Means:
    """The statistics of ``engine``'s inputs, tokens weighted; with ``also`` of that one's, and the drift between."""
    found = Means(dict(engine.input_of), {}, {}, {}, {})
    for number, batch in enumerate(batches):
        inputs = _inputs(engine, batch)
        moved = inputs if also is None else _inputs(also, batch)
        weight = None if weights is None else weights[number][:, None]
        for name, x in moved.items():
            held = found.held.setdefault(name, HeldOut.empty(1, x.shape[1]))
            if number % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1:
                held.add(0, x)
                continue
            weighted = x if weight is None else x * weight
            found.sums[name] = found.sums.get(name, 0) + weighted.T @ x
            found.counts[name] = found.counts.get(name, 0) + len(x)
            if also is not None:
                found.drifts[name] = found.drifts.get(name, 0) + (inputs[name] - x).T @ x
    return found


def _inputs(engine: Engine, batch: Sequence[Sequence[int]]) -> dict[str, Rows]:
    found: dict[str, Rows] = {}

    def take(activation: Activation) -> None:
        found[activation.weight] = np.array(activation.x, dtype=np.float32)

    engine.watch_inputs(batch, take)
    return found


def _natural(factor: Factor) -> npt.NDArray[np.float32]:
    """H with the columns in the order of the matrix."""
    back = np.argsort(factor.order)
    h: npt.NDArray[np.float32] = factor.h.numpy()[np.ix_(back, back)]
    return h


def resweep(type_name: str, data: Bytes, rows: Rows, factor: Factor) -> tuple[Bytes, Rows]:
    """Codes chosen once more, column by column."""
    import torch

    kind, n_rows = TENSOR_TYPES[type_name], len(rows)
    values = ggml().dequantize(kind.ggml_id, data, n_rows, rows.shape[1])
    slabs = [
        open_codes(type_name, np.ascontiguousarray(part), n_rows, kind.block_size, "cpu")
        for part in np.split(data, rows.shape[1] // kind.block_size, axis=1)
    ]
    if None in slabs:
        return data, values
    errors = torch.from_numpy(np.ascontiguousarray((rows - values).T))
    descend(slabs, torch.from_numpy(np.ascontiguousarray(rows.T)), errors, torch.from_numpy(_natural(factor)))
    data = np.concatenate([slab.data() for slab in slabs], axis=1)
    return data, ggml().dequantize(kind.ggml_id, data, n_rows, rows.shape[1])


def refitted(type_name: str, data: Bytes, rows: Rows, factor: Factor) -> tuple[Bytes, Rows]:
    """Block after block d (and dmin) of least error under H given all other blocks; then the codes once more."""
    kind = TENSOR_TYPES[type_name]
    width, h, data = kind.block_size, _natural(factor), data.copy()
    if width != 256:
        return resweep(type_name, data, rows, factor)
    values = ggml().dequantize(kind.ggml_id, data, len(rows), rows.shape[1])
    errors = rows - values
    fields = [_D_AT.get(type_name, 0), *([_D_MIN_AT[type_name]] if type_name in _D_MIN_AT else [])]
    for block in range(rows.shape[1] // width):
        here, at = (
            slice(block * width, (block + 1) * width),
            slice(block * kind.type_size, (block + 1) * kind.type_size),
        )
        part = np.ascontiguousarray(data[:, at])
        pull = errors @ h[:, here]
        for field in fields:
            # All values of the block without this field's share, by having it 0.
            without = part.copy()
            without[:, field : field + 2] = 0
            share = values[:, here] - ggml().dequantize(kind.ggml_id, without, len(rows), width)
            bent = share @ h[here, here]
            step = np.einsum("ij,ij->i", share, pull) / np.maximum(np.einsum("ij,ij->i", share, bent), 1e-30)
            d = np.ascontiguousarray(part[:, field : field + 2]).view(np.float16)[:, 0].astype(np.float32)
            part[:, field : field + 2] = (d * (1 + step)).astype(np.float16)[:, None].view(np.uint8)
            new = ggml().dequantize(kind.ggml_id, part, len(rows), width)
            pull += (values[:, here] - new) @ h[here, here]
            errors[:, here] += values[:, here] - new
            values[:, here] = new
        data[:, at] = part
    return resweep(type_name, data, rows, factor)
