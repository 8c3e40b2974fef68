"""The covariance Σxxᵀ of every input of a model's weights, in bounded memory, and rows of it that were held out.

Takes activations, gives three files an input: float32 [n_expert, n·(n+1)/2], the lower triangle row by row, raw sums;
int64 [n_expert], the rows summed; float32 [n_expert, HELD_OUT, n], rows of batches that are in no sum, NaN where there
were fewer. What does not fit into memory at once is left to further passes over the same text. Inverts nothing: that is
rounding's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dynrun.artifacts import atomic_path
from dynrun.calibration.collect import rows_by_expert
from dynrun.errors import DoesNotFitError, NotFoundError
from dynrun.llamacpp.graph import Activation

if TYPE_CHECKING:
    import torch

_BYTES_PER_ELEMENT = 4
# Rows of an input (of an expert's) that are kept, of every eighth batch.
HELD_OUT = 256
_HELD_OUT_EVERY = 8
# A Gram matrix is symmetric: of its columns in four slabs, ten sixteenths of the products are enough.
_SLABS = 4
# Columns of a triangle that are mirrored at once.
_MIRRORED = 256


@dataclass(frozen=True)
class Unit:
    """Experts ``first`` to ``last`` (exclusive) of one input of width ``n``: what a pass can take on."""

    input: str
    n: int
    first: int
    last: int

    @property
    def size_bytes(self) -> int:
        return (self.last - self.first) * one_bytes(self.n)


def one_bytes(n: int) -> int:
    """Memory for the matrix of one input of width ``n``, and for its rows held out."""
    return (n + HELD_OUT) * n * _BYTES_PER_ELEMENT


def plan_passes(inputs: Mapping[str, tuple[int, int]], memory_bytes: int) -> list[list[Unit]]:
    """Passes over the text that each keep within ``memory_bytes``; ``inputs[name]`` = (width, n_expert).

    Raises DoesNotFitError where one matrix alone is larger.
    """
    passes: list[list[Unit]] = [[]]
    left = memory_bytes
    for name, (n, n_expert) in inputs.items():
        one = one_bytes(n)
        if one > memory_bytes:
            raise DoesNotFitError(
                f"the covariance of {name} takes {one / 1e9:.2f} GB, more than {memory_bytes / 1e9:.2f} GB",
                fix=f"give --memory {-(-one // 10**6)}M",
            )
        first = 0
        while first < n_expert:
            if left < one:
                passes.append([])
                left = memory_bytes
            last = min(n_expert, first + left // one)
            passes[-1].append(Unit(name, n, first, last))
            left, first = left - passes[-1][-1].size_bytes, last
    return [units for units in passes if units]


class CovarianceSums:
    """Σxxᵀ of the units of one pass; an accumulator of :func:`~dynrun.calibration.collect.run_pass`.

    Summed in float32, on the GPU where torch has one: what a batch loses beside the sum of thousands is far below the
    damping that every use of the matrix needs.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        import torch

        self.units = {unit.input: unit for unit in units}
        self._device = _device()
        self.sums = {
            u.input: torch.zeros((u.last - u.first, u.n, u.n), dtype=torch.float32, device=self._device) for u in units
        }
        self.counts = {u.input: np.zeros(u.last - u.first, dtype=np.int64) for u in units}
        self.held = {u.input: HeldOut.empty(u.last - u.first, u.n) for u in units}
        self._holding = False

    @property
    def inputs(self) -> Collection[str]:
        return self.units.keys()

    def begin(self, batch: int) -> None:
        """Every eighth batch is held out."""
        self._holding = batch % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1

    def take(self, activation: Activation) -> None:
        """Add the Gram matrix of one input of one batch, or keep some of its rows."""
        import torch

        unit, x = self.units[activation.weight], activation.x
        groups = [(0, x)] if activation.experts is None else rows_by_expert(x, activation.experts)
        for expert, rows in groups:
            if not unit.first <= expert < unit.last:
                continue
            at = expert - unit.first
            if self._holding:
                self.held[unit.input].add(at, rows)
                continue
            self.counts[unit.input][at] += len(rows)
            _add_gram(self.sums[unit.input][at], torch.from_numpy(np.ascontiguousarray(rows)).to(self._device))

    def state(self) -> Mapping[str, npt.NDArray[Any]]:
        found: dict[str, npt.NDArray[Any]] = {}
        for name, sums in self.sums.items():
            held = self.held[name]
            found |= {f"sums/{name}": sums.cpu().numpy(), f"counts/{name}": self.counts[name]}
            found |= {f"rows/{name}": held.rows, f"seen/{name}": held.seen, f"experts/{name}": self._experts(name)}
        return found

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        import torch

        # Before anything is taken: with other --memory a pass has other units.
        if not all(np.array_equal(state[f"experts/{name}"], self._experts(name)) for name in self.units):
            raise KeyError("experts")
        for name in self.units:
            self.sums[name] = torch.from_numpy(state[f"sums/{name}"]).to(self._device)
            self.counts[name] = state[f"counts/{name}"]
            self.held[name] = HeldOut(state[f"rows/{name}"], state[f"seen/{name}"])

    def _experts(self, name: str) -> npt.NDArray[np.int64]:
        return np.array([self.units[name].first, self.units[name].last])

    def write(self, folder: Path) -> None:
        """The unit's matrices into ``folder``, the sums last: with them the unit is whole."""
        for name, unit in self.units.items():
            _save(folder / _file_name(unit, _HELD), self.held[name].rows)
            _save(folder / _file_name(unit, _COUNTS), self.counts[name])
            _save(folder / _file_name(unit, _SUMS), _pack(self.sums[name].cpu().numpy()))


@dataclass
class HeldOut:
    """``rows`` float32 [n_expert, HELD_OUT, n], evenly spread over the ``seen`` ones [n_expert]; NaN where none is."""

    rows: npt.NDArray[np.float32]
    seen: npt.NDArray[np.int64]

    @classmethod
    def empty(cls, n_expert: int, n: int) -> HeldOut:
        """Nothing yet."""
        rows = np.full((n_expert, HELD_OUT, n), np.nan, dtype=np.float32)
        return cls(rows, np.zeros(n_expert, dtype=np.int64))

    def add(self, expert: int, rows: npt.NDArray[np.float32]) -> None:
        """Keep every 2^k-th row, k growing as they come: the same rows whatever batches they came in."""
        for row in rows:
            number = int(self.seen[expert])
            self.seen[expert] += 1
            stride = 1
            while number >= HELD_OUT * stride:
                stride *= 2
            if number % stride:
                continue
            if number == HELD_OUT * stride // 2 and stride > 1:
                self.rows[expert, : HELD_OUT // 2] = self.rows[expert, ::2]
                self.rows[expert, HELD_OUT // 2 :] = np.nan
            self.rows[expert, number // stride] = row


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, array)


def _add_gram(sums: torch.Tensor, x: torch.Tensor) -> None:
    """sums += xᵀx in the lower triangle's slabs; the rest of ``sums`` [n, n] is left behind."""
    n = sums.shape[0]
    step = -(-n // _SLABS)
    for start in range(0, n, step):
        stop = min(n, start + step)
        sums[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _pack(square: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Lower triangles [n_expert, n·(n+1)/2] of ``square`` [n_expert, n, n]."""
    packed = np.empty((len(square), square.shape[-1] * (square.shape[-1] + 1) // 2), dtype=np.float32)
    for one, its in zip(square, packed, strict=True):
        for i, part in enumerate(_triangle(its)):
            part[:] = one[i, : i + 1]
    return packed


def _unpack(packed: npt.NDArray[np.float32], n: int) -> npt.NDArray[np.float32]:
    square = np.zeros((n, n), dtype=np.float32)
    for i, part in enumerate(_triangle(packed)):
        square[i, : i + 1] = part
    # Mirrored square by square, which is six times as fast as entry by entry.
    for start in range(0, n, _MIRRORED):
        stop = min(n, start + _MIRRORED)
        square[:start, start:stop] = square[start:stop, :start].T
        corner = square[start:stop, start:stop]
        corner += np.tril(corner, -1).T
    return square


def _triangle(packed: npt.NDArray[np.float32]) -> Iterator[npt.NDArray[np.float32]]:
    """Its rows: 1, 2, 3, … values."""
    start, length = 0, 1
    while start < len(packed):
        yield packed[start : start + length]
        start, length = start + length, length + 1


_SUMS, _COUNTS, _HELD = "sums", "counts", "held"


def _file_name(unit: Unit, what: str) -> str:
    return f"{unit.input}.{unit.n}.{unit.first}-{unit.last}.{what}.npy"


_FILE_NAME = re.compile(rf"(?P<input>.+)\.(?P<n>\d+)\.(?P<first>\d+)-(?P<last>\d+)\.{_SUMS}\.npy")


@dataclass(frozen=True)
class Covariance:
    """The matrices on disk. ``input_of[weight]`` names the input that a weight shares."""

    folder: Path
    input_of: Mapping[str, str]

    def matrix(self, weight: str, expert: int = 0) -> npt.NDArray[np.float32]:
        """Σxxᵀ [n, n] of the input of ``weight``, float32, symmetric. Raises NotFoundError where it has none."""
        unit = self._unit(weight, expert)
        return _unpack(self._part(unit, _SUMS)[expert - unit.first], unit.n)

    def layer_mean(self, weight: str) -> npt.NDArray[np.float32]:
        """Mean of xxᵀ [n, n] over the rows of all experts of ``weight``, float32. Raises NotFoundError."""
        units = [unit for unit in self._units if unit.input == self.input_of.get(weight)]
        if not units:
            raise NotFoundError(f"no covariance of {weight} in {self.folder}")
        total = np.zeros(self._part(units[0], _SUMS).shape[1:], np.float64)
        for unit in units:
            for packed in self._part(unit, _SUMS):
                total += packed
        n_rows = sum(int(self._part(unit, _COUNTS).sum()) for unit in units)
        return _unpack((total / max(n_rows, 1)).astype(np.float32), units[0].n)

    def count(self, weight: str, expert: int = 0) -> int:
        """Rows that are summed in :meth:`matrix`. Raises NotFoundError."""
        unit = self._unit(weight, expert)
        return int(self._part(unit, _COUNTS)[expert - unit.first])

    def held_out(self, weight: str, expert: int = 0) -> npt.NDArray[np.float32]:
        """Rows [at most HELD_OUT, n] of the input that are in no sum. Raises NotFoundError."""
        unit = self._unit(weight, expert)
        rows: npt.NDArray[np.float32] = self._part(unit, _HELD)[expert - unit.first]
        return rows[~np.isnan(rows[:, 0])]

    def _part(self, unit: Unit, what: str) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = np.load(self.folder / _file_name(unit, what), mmap_mode="r")
        return found

    def _unit(self, weight: str, expert: int) -> Unit:
        wanted = self.input_of.get(weight)
        for unit in self._units:
            if unit.input == wanted and unit.first <= expert < unit.last:
                return unit
        raise NotFoundError(f"no covariance of {weight} (expert {expert}) in {self.folder}")

    @cached_property
    def _units(self) -> list[Unit]:
        found = (_FILE_NAME.fullmatch(path.name) for path in sorted(self.folder.iterdir()))
        return [Unit(m["input"], int(m["n"]), int(m["first"]), int(m["last"])) for m in found if m]


def is_written(unit: Unit, folder: Path) -> bool:
    """Whether an earlier run finished the pass that ``unit`` is in."""
    return (folder / _file_name(unit, _SUMS)).is_file()
