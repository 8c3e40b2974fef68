"""Slabs of the codebook types (IQ1, IQ2, IQ3), opened so that grid vectors and signs are chosen again.

The scales stay as ggml set them. In units of a group's scale, y = x/scale, a code's error is the same quadratic form
in every row, so that all of the grid is searched by a matrix product of features of the rows with features of the grid.
Signs follow y; some are turned on trial. Which bits of a block hold what is known to grids.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dynrun.rounding.grids import BLOCK, LAYOUTS

if TYPE_CHECKING:
    import torch

# Costs computed at once: what stays in a core's cache, and 64 MB for a GPU.
_CACHED, _LARGE = 1 << 19, 1 << 24
# Signs tried where their parity is wrong. Random metrics of 8 columns: one is 4–20% above the optimum, three 0–3%.
_N_REPAIRS = 3
# A sign is turned on trial where that costs less than this part of the row's error, the magnitudes not yet adapted.
_WORTH_TURNING = 1.0


def open_codebook(
    type_name: str, data: npt.NDArray[np.uint8], n_rows: int, n_columns: int, device: str
) -> Codebook | None:
    """Open ``data``, ``n_rows`` × ``n_columns`` values in a codebook type, on a torch device; None for other types.

    Raises ValueError where ``data`` has another size.
    """
    if type_name not in LAYOUTS:
        return None
    if data.size * BLOCK != n_rows * n_columns * LAYOUTS[type_name].type_size:
        raise ValueError(f"{data.size} bytes for {n_rows} × {n_columns} values in {type_name}")
    return Codebook(type_name, data.reshape(n_rows, -1), n_columns, device)


class Codebook:
    """The codes of a slab (formats.Codes); make it with :func:`open_codebook`."""

    def __init__(self, type_name: str, data: npt.NDArray[np.uint8], n_columns: int, device: str) -> None:
        import torch

        self._layout, self._data, self._n_columns = LAYOUTS[type_name], data, n_columns
        self.width = self._layout.width
        self._grid = _grid(type_name, device)
        fields = self._layout.unpack(data)
        self._scales = torch.from_numpy(fields.scales).to(device)
        # [n_groups, vectors of a group, n_rows] and [n_groups, n_rows].
        self._indices = torch.from_numpy(fields.indices).to(device).reshape(n_columns // self.width, -1, len(data))
        self._patterns = torch.from_numpy(fields.patterns).to(device)

    def choose(self, first: int, x: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
        """As formats.Codes. No row's error is larger than with the codes that ggml chose."""
        import torch

        group = first // self.width
        scale = self._scales[first * len(self._scales) // self._n_columns]
        y = x / torch.where(scale == 0, 1.0, scale)
        search = _Search(self._grid, metric)
        old = search.measure(y, self._indices[group].long(), self._patterns[group].long())
        new = search.shifted(y, old) if self._layout.shift else search.signed(y)
        # Without a scale all codes are worth the same.
        best = new.where((new.cost < old.cost) & (scale != 0), old)
        self._indices[group], self._patterns[group] = best.indices, best.pattern
        return scale * self._grid.values(best.indices, best.pattern)

    def data(self) -> npt.NDArray[np.uint8]:
        """As formats.Codes."""
        indices = self._indices.reshape(-1, len(self._data)).cpu().numpy()
        return self._layout.pack(self._data, indices, self._patterns.cpu().numpy())


@dataclass(frozen=True)
class _Found:
    """Codes of rows: grid ``indices`` [n_vectors, n_rows], ``pattern`` [n_rows] of signs or shift; their ``error``
    y − q [width, n_rows] and its ``cost`` [n_rows] in the metric."""

    indices: torch.Tensor
    pattern: torch.Tensor
    error: torch.Tensor
    cost: torch.Tensor

    def where(self, mask: torch.Tensor, other: _Found) -> _Found:
        """These codes where ``mask``, else the other ones."""
        import torch

        return _Found(*(torch.where(mask, mine, its) for mine, its in zip(self._all(), other._all(), strict=True)))

    def take(self, rows: torch.Tensor) -> _Found:
        """The codes of ``rows`` (numbers)."""
        return _Found(*(values.index_select(-1, rows) for values in self._all()))

    def put(self, rows: torch.Tensor, others: _Found) -> None:
        """Overwrite the codes of ``rows``."""
        for values, new in zip(self._all(), others._all(), strict=True):
            values.index_copy_(-1, rows, new)

    def _all(self) -> tuple[torch.Tensor, ...]:
        return self.indices, self.pattern, self.error, self.cost


class _Grid:
    """A type's grid on a device, and what of the search depends on it alone."""

    def __init__(self, type_name: str, device: str) -> None:
        import torch

        layout = LAYOUTS[type_name]
        self.vectors = torch.from_numpy(layout.grid.T.copy()).to(device)
        self.width, self.even, self.shift_is_shared = layout.width, layout.even, layout.shift_is_shared
        self.smallest = float(np.abs(layout.grid).min())
        size = len(self.vectors)
        self.pairs = torch.triu_indices(size, size, 1, device=device)
        self.products = self.vectors[self.pairs[0]] * self.vectors[self.pairs[1]]
        self.vector_signs = _signs(size).to(device)
        self.pair_signs = self.vector_signs[self.pairs[0]] * self.vector_signs[self.pairs[1]]
        self.signs = _signs(self.width).to(device)
        self.is_odd = (self.signs.prod(0) < 0) if self.even else None
        self.shifts = torch.tensor([layout.shift, -layout.shift], device=device) if layout.shift else None
        self.powers = 2 ** torch.arange(self.width, device=device)

    def values(self, indices: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
        """What codes stand for, in units of the scale [width, n_rows]."""
        import torch

        vectors = torch.cat([self.vectors.index_select(1, one) for one in indices])
        if self.shifts is not None:
            return vectors + self.shifts[pattern]
        return vectors * self.signs.index_select(1, pattern)


@cache
def _grid(type_name: str, device: str) -> _Grid:
    return _Grid(type_name, device)


def _signs(width: int) -> torch.Tensor:
    """The signs ±1 [width, 2^width] of each pattern."""
    import torch

    return 1.0 - 2.0 * (torch.arange(2**width) >> torch.arange(width)[:, None] & 1)


class _Nearest:
    """The nearest of all grid vectors v for given signs S: the least (y − Sv)ᵀM(y − Sv), which is, without yᵀMy,
    Σ M_ii·v_i² + Σ_{i<j} 2·M_ij·S_i·S_j·v_i·v_j − 2·(S·My)ᵀv."""

    def __init__(self, grid: _Grid, metric: torch.Tensor) -> None:
        import torch

        self._grid, self._linear = grid, -2.0 * metric
        i, j = grid.pairs
        twice = 2.0 * metric[i, j]
        squares = metric.diagonal() @ grid.vectors.square()
        if grid.shifts is None:
            self._table = torch.cat([grid.products, squares[None], grid.vectors])
            ones = torch.ones_like(grid.pair_signs[:1])
            self._folded = torch.cat([twice[:, None] * grid.pair_signs, ones])
        else:
            self._table = torch.cat([(squares + twice @ grid.products)[None], grid.vectors])

    def __call__(self, y: torch.Tensor, pattern: torch.Tensor | None) -> torch.Tensor:
        """Indices [n_rows] for ``y`` [columns of a vector, n_rows]; ``pattern`` None for grids that hold the signs."""
        import torch

        linear = self._linear @ y
        if pattern is None:
            return self._least(torch.cat([torch.ones_like(y[:1]), linear]))
        signs = self._grid.vector_signs.index_select(1, pattern)
        return self._least(torch.cat([self._folded.index_select(1, pattern), signs * linear]))

    def _least(self, features: torch.Tensor) -> torch.Tensor:
        """The column of the least product of the rows' features [n, n_rows] with the grid's [n, size]."""
        import torch

        n_rows, size = features.shape[1], self._table.shape[1]
        on_cpu = features.device.type == "cpu"
        step = (_CACHED if on_cpu else _LARGE) // size
        costs = torch.empty((min(step, n_rows), size), device=features.device)
        found = torch.empty(n_rows, dtype=torch.int64, device=features.device)
        for start in range(0, n_rows, step):
            stop = min(start + step, n_rows)
            part = costs[: stop - start]
            torch.mm(features.T[start:stop], self._table, out=part)
            # numpy's argmin is vectorized, torch's is not on a CPU: it would take most of the time.
            found[start:stop] = torch.from_numpy(part.numpy().argmin(1)) if on_cpu else part.argmin(1)
        return found


class _Search:
    """Codes for a group of columns in one metric."""

    def __init__(self, grid: _Grid, metric: torch.Tensor) -> None:
        self._grid, self._metric = grid, metric
        self._size = n = len(grid.vectors)
        if n == grid.width:
            self._nearest = _Nearest(grid, metric)
            return
        # Of two vectors the second makes up for what it can of the first one's error e: it aims at y₂ + K·e, which
        # leaves the Schur complement as the first one's metric.
        first, cross, second = metric[:n, :n], metric[:n, n:], metric[n:, n:]
        self._ahead, self._back = _inverse(second) @ cross.T, _inverse(first) @ cross
        self._nearest = _Nearest(grid, first - cross @ self._ahead)
        self._second, self._first_again = _Nearest(grid, second), _Nearest(grid, first)

    def measure(self, y: torch.Tensor, indices: torch.Tensor, pattern: torch.Tensor) -> _Found:
        """Given codes with their errors."""
        error = y - self._grid.values(indices, pattern)
        return _Found(indices, pattern, error, (error * (self._metric @ error)).sum(0))

    def shifted(self, y: torch.Tensor, old: _Found) -> _Found:
        """Codes of a type without signs; ``old``: ggml's, whose shift stands where groups share it."""
        import torch

        assert self._grid.shifts is not None
        shared = self._grid.shift_is_shared
        patterns = [old.pattern] if shared else [torch.full_like(old.pattern, bit) for bit in (0, 1)]
        found = [self.measure(y, self._nearest(y - self._grid.shifts[p], None)[None], p) for p in patterns]
        return found[0] if shared else found[0].where(found[0].cost < found[1].cost, found[1])

    def signed(self, y: torch.Tensor) -> _Found:
        """Codes of a type with signs."""
        import torch

        found = self._magnitudes(y, (self._grid.powers[:, None] * (y < 0)).sum(0))
        if self._grid.is_odd is None:
            return self._turned(y, found, torch.arange(y.shape[1], device=y.device))
        is_odd = self._grid.is_odd[found.pattern]
        odd, even = is_odd.nonzero().flatten(), (~is_odd).nonzero().flatten()
        self._repair(y, found, odd)
        self._turned(y, found, even)
        return found if self._size == self._grid.width else self._refined(y, found)

    def _magnitudes(self, y: torch.Tensor, pattern: torch.Tensor) -> _Found:
        """The magnitudes for given signs."""
        n = self._size
        if n == self._grid.width:
            return self.measure(y, self._nearest(y, pattern)[None], pattern)
        return self._with_second(y, pattern, self._nearest(y[:n], pattern & (2**n - 1)))

    def _with_second(self, y: torch.Tensor, pattern: torch.Tensor, first: torch.Tensor) -> _Found:
        import torch

        n, grid = self._size, self._grid
        signs = grid.signs[:n].index_select(1, pattern)
        error = y[:n] - grid.vectors.index_select(1, first) * signs
        second = self._second(torch.addmm(y[n:], self._ahead, error), pattern >> n)
        return self.measure(y, torch.stack([first, second]), pattern)

    def _refined(self, y: torch.Tensor, found: _Found) -> _Found:
        """The first vector chosen again for the error that the second has come to, and the second after it."""
        import torch

        n = self._size
        aim = torch.addmm(y[:n], self._back, found.error[n:])
        again = self._with_second(y, found.pattern, self._first_again(aim, found.pattern & (2**n - 1)))
        return again.where(again.cost < found.cost, found)

    def _turning(self, y: torch.Tensor, found: _Found) -> tuple[torch.Tensor, torch.Tensor]:
        """By how much a value falls when its sign is turned and its magnitude becomes the smallest, and what this adds
        to the cost while all others stay, both [width, n_rows]."""
        q = y - found.error
        step = q + q.sign() * self._grid.smallest
        return step, step * (step * self._metric.diagonal()[:, None] + 2.0 * (self._metric @ found.error))

    def _repair(self, y: torch.Tensor, found: _Found, rows: torch.Tensor) -> None:
        """Make the parity of ``rows`` even: turn the sign that is best among those that look cheapest."""
        some, y = found.take(rows), y.index_select(1, rows)
        _, added = self._turning(y, some)
        cheapest = added.topk(_N_REPAIRS, dim=0, largest=False, sorted=False).indices
        found.put(rows, self._best_turned(y, some, self._grid.powers[cheapest]))

    def _turned(self, y: torch.Tensor, found: _Found, rows: torch.Tensor) -> _Found:
        """``found`` with one sign turned, or two where parity is kept, in those of ``rows`` that gain by it."""
        some, wanted = found.take(rows), y.index_select(1, rows)
        step, added = self._turning(wanted, some)
        masks = self._grid.powers
        if self._grid.even:
            import torch

            i, j = torch.triu_indices(self._grid.width, self._grid.width, 1, device=y.device)
            added = added[i] + added[j] + 2.0 * self._metric[i, j][:, None] * step[i] * step[j]
            masks = masks[i] + masks[j]
        least, which = added.min(0)
        worth = (least < _WORTH_TURNING * some.cost).nonzero().flatten()
        some, mask = some.take(worth), masks[which[worth]]
        tried = self._best_turned(wanted.index_select(1, worth), some, mask[None])
        gains = (tried.cost < some.cost).nonzero().flatten()
        found.put(rows[worth[gains]], tried.take(gains))
        return found

    def _best_turned(self, y: torch.Tensor, found: _Found, masks: torch.Tensor) -> _Found:
        """The best of the codes whose patterns differ by ``masks`` [n_tried, n_rows]."""
        import torch

        n_tried, n_rows = masks.shape
        tried = self._magnitudes(y.repeat(1, n_tried), (found.pattern ^ masks).flatten())
        best = tried.cost.reshape(n_tried, n_rows).argmin(0) if n_tried > 1 else torch.zeros_like(found.pattern)
        return tried.take(best * n_rows + torch.arange(n_rows, device=y.device))


def _inverse(metric: torch.Tensor) -> torch.Tensor:
    """In float64, and of a singular matrix the pseudo-inverse: columns that no input reaches have no metric."""
    import torch

    inverse: torch.Tensor = torch.linalg.pinv(metric.double(), hermitian=True)
    return inverse.to(metric.dtype)
