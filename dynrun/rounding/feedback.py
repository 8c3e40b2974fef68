"""Round a matrix into a tensor type, the error of the columns done pushed into the columns still to come.

Columns go slab by slab, a slab as wide as the type's block. ggml_quantize_chunk chooses the block scales of a slab from
its targets, W + E·V (factor.py); within them the codes are chosen again, group by group, with the same feedback
(formats.py). Chooses no damping and reads no file.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.llamacpp.library import ggml
from dynrun.rounding.factor import Factor

if TYPE_CHECKING:
    import torch

    from dynrun.rounding.formats import Codes

Rows = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
# Columns whose feedback to later ones is one matrix product instead of one per column.
_LAZY = 32


class Rounder:
    """Rounds matrices with error feedback, ggml's part of the work on ``n_threads`` threads."""

    def __init__(self, n_threads: int, device: str = "cpu") -> None:
        self._pool, self._n_threads, self.device = ThreadPoolExecutor(n_threads), n_threads, device
        self._ggml = ggml()

    def round(
        self, rows: Rows, factor: Factor, type_name: str, importance: Rows | None, *, within: bool = True
    ) -> tuple[Bytes, Rows]:
        """Bytes [n_rows, bytes per row] and values [n_rows, n] of ``rows`` in ``type_name``.

        ``importance`` [n] is what ggml weighs squared errors with while it searches scales. Without ``within`` a slab's
        codes stay as ggml chose them.
        """
        import torch

        kind, n_rows = TENSOR_TYPES[type_name], len(rows)
        width, n = kind.block_size, rows.shape[1]
        weights = torch.from_numpy(np.ascontiguousarray(rows.T)).to(self.device)
        errors, values = torch.zeros_like(weights), np.empty_like(rows)
        data = np.empty((n_rows, n // width, kind.type_size), dtype=np.uint8)
        self._ggml.ggml_quantize_init(kind.ggml_id)
        for start in range(0, n, width):
            # Columns in the order of the factor; a slab's are neighbours in the matrix.
            here, first = slice(start, start + width), int(factor.order[start])
            slab = slice(first, first + width)
            target = weights[slab]
            if start:
                between = factor.between(slice(0, start), here)
                target = torch.addmm(target, between.T, errors[:start])
            found = self._quantize(kind.ggml_id, target, None if importance is None else importance[slab])
            codes = self._open(type_name, found, n_rows, width) if within else None
            if codes is None:
                q = self._values(kind.ggml_id, found, n_rows, width)
            else:
                q = choose_codes(codes, target, factor.r[here, here])
                found = codes.data()
            errors[here] = weights[slab] - q
            values[:, slab] = q.T.cpu().numpy()
            data[:, first // width] = found.reshape(n_rows, kind.type_size)
        return data.reshape(n_rows, -1), values

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
