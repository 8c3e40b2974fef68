"""Round a matrix into a tensor type, the error of the columns done pushed into the columns still to come.

Columns go slab by slab, a slab as wide as the type's block. ggml_quantize_chunk chooses the block scales of a slab from
its targets, W + E·V (factor.py); within them the codes are chosen again, group by group, with the same feedback
(formats.py). Chooses no damping and reads no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.llamacpp.library import ggml
from dynrun.rounding.descent import descend
from dynrun.rounding.factor import Factor
from dynrun.rounding.formats import open_codes, width_of
from dynrun.rounding.threads import Threads

if TYPE_CHECKING:
    import torch

    from dynrun.rounding.formats import Codes

Rows = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Quantize = Callable[[int, Rows, Rows | None], Bytes]
# Columns whose feedback to later ones is one matrix product instead of one per column.
_LAZY = 32
# Rows that one thread searches codebooks for, about; with fewer, threads wait for each other's turn in the interpreter.
_GROUP = 1500


@dataclass(frozen=True)
class _Slab:
    """Bytes [n_rows, bytes] as ggml made them, and their codes where those are open."""

    data: Bytes
    codes: Codes | None = None

    def packed(self) -> Bytes:
        return self.data if self.codes is None else self.codes.data()


@dataclass(frozen=True)
class _Columns:
    """What the slab ``here`` is rounded with: V of the columns done before [done, width], none of the first slab;
    (I+V) and D in itself (:func:`blocks`), none where its codes stay; what ggml weighs errors with [width]."""

    here: slice
    between: torch.Tensor | None
    within: tuple[torch.Tensor, torch.Tensor] | None
    importance: Rows | None


class _Group:
    """Some rows of a matrix, rounded slab by slab: ``weights`` and their errors [n, n_rows], columns in the order of
    the factor."""

    def __init__(self, type_name: str, weights: torch.Tensor, quantize: _Quantize) -> None:
        import torch

        self.type_name, self.weights, self.errors = type_name, weights, torch.zeros_like(weights)
        self._quantize = quantize
        self.slabs: list[_Slab] = []

    def round(self, columns: _Columns) -> None:
        """Do the next slab."""
        import torch

        here, done = columns.here, columns.here.start
        target = self.weights[here]
        if columns.between is not None:
            target = torch.addmm(target, columns.between.T, self.errors[:done])
        slab, values = self._slab(target, columns)
        self.errors[here] = self.weights[here] - values
        self.slabs.append(slab)

    def _slab(self, target: torch.Tensor, columns: _Columns) -> tuple[_Slab, torch.Tensor]:
        """A slab [width, n_rows] by ggml, its codes chosen again with feedback where it has one; its values."""
        import torch

        type_id, (width, n_rows), device = TENSOR_TYPES[self.type_name].ggml_id, target.shape, str(target.device)
        rows = np.ascontiguousarray(target.T.cpu().numpy())
        data = self._quantize(type_id, rows, columns.importance)
        if columns.within is not None:
            codes = open_codes(self.type_name, data, n_rows, width, device)
            assert codes is not None
            return _Slab(data, codes), choose_codes(codes, target, *columns.within)
        values = ggml().dequantize(type_id, data, n_rows, width)
        return _Slab(data), torch.from_numpy(np.ascontiguousarray(values.T)).to(device)

    def descend(self, h: torch.Tensor, sweeps: int) -> None:
        """Choose the codes of all slabs again, where they are open."""
        opened = [slab.codes for slab in self.slabs if slab.codes is not None]
        for _ in range(sweeps if opened else 0):
            descend(opened, self.weights, self.errors, h)

    def data(self, order: npt.NDArray[np.int64]) -> Bytes:
        """The rows' bytes."""
        return _in_place([slab.packed() for slab in self.slabs], order, TENSOR_TYPES[self.type_name].block_size)


class Rounder:
    """Rounds matrices with error feedback. Codebooks are searched on ``n_threads`` threads: groups of rows, and several
    matrices at once. Scalar types are not: a column of theirs is a dozen small operations, which would only wait for
    each other's turn in the interpreter; torch's products have its own threads."""

    def __init__(self, n_threads: int, device: str = "cpu") -> None:
        self._n_threads, self.device = n_threads, device
        # Each of them may wait for those behind it.
        self._callers, self._threads, self._ggml = Threads(n_threads), Threads(n_threads), ThreadPoolExecutor(n_threads)

    def at_once(self, type_name: str) -> int:
        """Matrices that are worth rounding side by side (:meth:`each`)."""
        return self._n_threads if self._searched(type_name) else 1

    def each(self, function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """Results of a ``function`` that rounds, in the order of ``items``."""
        return self._callers.map(function, items)

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
        kind, n, width = TENSOR_TYPES[type_name], rows.shape[1], width_of(type_name) if within else None
        ggml().ggml_quantize_init(kind.ggml_id)
        groups = self._groups(rows, factor, type_name)
        for start in range(0, n, kind.block_size):
            here = slice(start, start + kind.block_size)
            columns = _Columns(
                here,
                factor.between(slice(0, start), here) if start else None,
                None if width is None else blocks(factor.r[here, here], width),
                None if importance is None else importance[factor.order[here]],
            )
            self._in_each(groups, partial(_Group.round, columns=columns))
        self._in_each(groups, partial(_Group.descend, h=factor.h, sweeps=sweeps))
        data = np.concatenate([group.data(factor.order) for group in groups])
        return data, ggml().dequantize(kind.ggml_id, data, len(rows), n)

    def _groups(self, rows: Rows, factor: Factor, type_name: str) -> list[_Group]:
        """As many groups of equal size as a power of two: threads are, too. It depends on the rows alone, as matrix
        products of another shape may round otherwise."""
        import torch

        n = 2 ** max(0, round(math.log2(len(rows) / _GROUP))) if self._searched(type_name) else 1
        # Columns in the order of the factor, in which a slab's are neighbours.
        parts = (np.ascontiguousarray(part[:, factor.order].T) for part in np.array_split(rows, n))
        return [_Group(type_name, torch.from_numpy(part).to(self.device), self._quantize) for part in parts]

    def _in_each(self, groups: Sequence[_Group], function: Callable[[_Group], None]) -> None:
        if self._searched(groups[0].type_name):
            self._threads.map(function, groups)
        else:
            function(groups[0])

    def _searched(self, type_name: str) -> bool:
        """Whether a type's codes are found by large products that are best made side by side: those of codebooks."""
        return self.device == "cpu" and (width_of(type_name) or 0) > 1

    def _quantize(self, type_id: int, rows: Rows, importance: Rows | None) -> Bytes:
        step = max(64, -(-len(rows) // (4 * self._n_threads)))
        chunks = [rows[start : start + step] for start in range(0, len(rows), step)]
        parts = self._ggml.map(lambda chunk: ggml().quantize(type_id, chunk, importance), chunks)
        return np.concatenate(list(parts)).reshape(len(rows), -1)


def _in_place(slabs: Sequence[Bytes], order: npt.NDArray[np.int64], width: int) -> Bytes:
    """Slabs [n_rows, bytes] in the order of the factor as rows [n_rows, bytes per row] of the matrix."""
    n_rows = len(slabs[0])
    data = np.empty((n_rows, len(slabs), slabs[0].shape[1]), dtype=np.uint8)
    for number, slab in enumerate(slabs):
        data[:, order[number * width] // width] = slab
    return data.reshape(n_rows, -1)


def choose_codes(codes: Codes, target: torch.Tensor, unit: torch.Tensor, metrics: torch.Tensor) -> torch.Tensor:
    """The values of a slab [width, n_rows] for ``target``, its codes chosen group by group with feedback (blocks)."""
    import torch

    n, group = len(target), codes.width
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
    if group == 1:
        # As below, without 256 calls.
        own = torch.diagonal(r)
        return r * (1 / own), own.square()[:, None, None]
    diagonal = torch.stack([r[i : i + group, i : i + group] for i in range(0, n, group)])
    unit = torch.empty_like(r)
    for i, block in enumerate(diagonal):
        here = slice(i * group, (i + 1) * group)
        unit[:, here] = torch.linalg.solve_triangular(block, r[:, here], upper=True, left=False)
    return unit, diagonal @ diagonal.transpose(1, 2)
