"""Round a matrix into a tensor type, the error of the columns done pushed into the columns still to come.

Columns go slab by slab, a slab as wide as the type's block. ggml_quantize_chunk chooses the block scales of a slab from
its targets, W + E·V (factor.py); within them the codes are chosen again, group by group, with the same feedback
(formats.py). Chooses no damping and reads no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.llamacpp.library import ggml
from dynrun.rounding.descent import descend
from dynrun.rounding.factor import Factor

if TYPE_CHECKING:
    import torch

    from dynrun.rounding.formats import Codes

Rows = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
# Columns whose feedback to later ones is one matrix product instead of one per column.
_LAZY = 32


@dataclass(frozen=True)
class _Slab:
    """Bytes [n_rows, bytes] as ggml made them, and their codes where those are open."""

    data: Bytes
    codes: Codes | None = None

    def packed(self) -> Bytes:
        return self.data if self.codes is None else self.codes.data()


class Rounder:
    """Rounds matrices with error feedback, ggml's part of the work on ``n_threads`` threads."""

    def __init__(self, n_threads: int, device: str = "cpu") -> None:
        self._pool, self._n_threads, self.device = ThreadPoolExecutor(n_threads), n_threads, device
        self._ggml = ggml()

    def round(
        self,
        rows: Rows,
        factor: Factor,
        type_name: str,
        importance: Rows | None,
        *,
        within: bool = True,
        sweeps: int = 0,
    ) -> tuple[Bytes, Rows]:
        """Bytes [n_rows, bytes per row] and values [n_rows, n] of ``rows`` in ``type_name``.

        ``importance`` [n] is what ggml weighs squared errors with while it searches scales. Without ``within`` a slab's
        codes stay as ggml chose them; with it they are chosen again in ``sweeps`` sweeps (descent.py).
        """
        import torch

        kind, n = TENSOR_TYPES[type_name], rows.shape[1]
        # Columns in the order of the factor, in which a slab's are neighbours.
        weights = torch.from_numpy(np.ascontiguousarray(rows[:, factor.order].T)).to(self.device)
        errors = torch.zeros_like(weights)
        slabs: list[_Slab] = []
        self._ggml.ggml_quantize_init(kind.ggml_id)
        for start in range(0, n, kind.block_size):
            here = slice(start, start + kind.block_size)
            target = weights[here]
            if start:
                target = torch.addmm(target, factor.between(slice(0, start), here).T, errors[:start])
            weight = None if importance is None else importance[factor.order[here]]
            slab, values = self._slab(type_name, target, weight, factor.r[here, here] if within else None)
            errors[here] = weights[here] - values
            slabs.append(slab)
        opened = [slab.codes for slab in slabs if slab.codes is not None]
        for _ in range(sweeps if opened else 0):
            descend(opened, weights, errors, factor.h)
        data = _in_place([slab.packed() for slab in slabs], factor.order, kind.block_size)
        return data, self._ggml.dequantize(kind.ggml_id, data, len(rows), n)

    def _slab(
        self, type_name: str, target: torch.Tensor, importance: Rows | None, r: torch.Tensor | None
    ) -> tuple[_Slab, torch.Tensor]:
        """A slab [width, n_rows] by ggml, its codes chosen again with feedback by ``r`` if there is one; its values."""
        type_id, (width, n_rows) = TENSOR_TYPES[type_name].ggml_id, target.shape
        data = self._quantize(type_id, target, importance)
        codes = None if r is None else self._open(type_name, data, n_rows, width)
        if r is None or codes is None:
            return _Slab(data), self._values(type_id, data, n_rows, width)
        return _Slab(data, codes), choose_codes(codes, target, r)

    def _open(self, type_name: str, data: Bytes, n_rows: int, width: int) -> Codes | None:
        from dynrun.rounding.formats import open_codes

        return open_codes(type_name, data, n_rows, width, self.device)

    def _chunks(self, n_rows: int) -> list[slice]:
        step = max(64, -(-n_rows // (4 * self._n_threads)))
        return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]

    def _quantize(self, type_id: int, target: torch.Tensor, importance: Rows | None) -> Bytes:
        rows = np.ascontiguousarray(target.T.cpu().numpy())
        parts = self._pool.map(
            lambda chunk: self._ggml.quantize(type_id, rows[chunk], importance), self._chunks(len(rows))
        )
        return np.concatenate(list(parts)).reshape(len(rows), -1)

    def _values(self, type_id: int, data: Bytes, n_rows: int, width: int) -> torch.Tensor:
        import torch

        found = self._ggml.dequantize(type_id, data, n_rows, width)
        return torch.from_numpy(np.ascontiguousarray(found.T)).to(self.device)


def _in_place(slabs: Sequence[Bytes], order: npt.NDArray[np.int64], width: int) -> Bytes:
    """Slabs [n_rows, bytes] in the order of the factor as rows [n_rows, bytes per row] of the matrix."""
    n_rows = len(slabs[0])
    data = np.empty((n_rows, len(slabs), slabs[0].shape[1]), dtype=np.uint8)
    for number, slab in enumerate(slabs):
        data[:, order[number * width] // width] = slab
    return data.reshape(n_rows, -1)


def choose_codes(codes: Codes, target: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """The values of a slab [width, n_rows] for ``target``, its codes chosen group by group with feedback by ``r``."""
    import torch

    n, group = len(target), codes.width
    unit, metrics = blocks(r, group)
    q, errors = torch.empty_like(target), torch.empty_like(target)
    for start in range(0, n, _LAZY):
        stop = min(n, start + _LAZY)
        wanted = target[start:stop]
        wanted = torch.addmm(wanted, unit[:start, start:stop].T, errors[:start]) if start else wanted.clone()
        for first in range(start, stop, group):
            last = first + group
            x = wanted[first - start : last - start]
            q[first:last] = codes.choose(first, x, metrics[first // group])
            # The error against the slab's target, not against what feedback made of it.
            errors[first:last] = target[first:last] - q[first:last]
            if last < stop:
                wanted[last - start :].addmm_(unit[first:last, last:stop].T, errors[first:last])
    return q


def blocks(r: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """I+V [n, n] and D [n/group, group, group] of R·Rᵀ = (I+V)·D·(I+V)ᵀ, with blocks of ``group`` columns."""
    import torch

    n = len(r)
    diagonal = torch.stack([r[i : i + group, i : i + group] for i in range(0, n, group)])
    unit = torch.empty_like(r)
    for i, block in enumerate(diagonal):
        here = slice(i * group, (i + 1) * group)
        unit[:, here] = torch.linalg.solve_triangular(block, r[:, here], upper=True, left=False)
    return unit, diagonal @ diagonal.transpose(1, 2)
