"""The covariance Σxxᵀ of every input of a model's weights, in bounded memory.

Takes activations, gives one file an input: float32 [n_expert, n·(n+1)/2], the lower triangle row by row, raw sums over
as many rows as the imatrix counts. What does not fit into memory at once is left to further passes over the same text.
Inverts nothing: that is rounding's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
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

# One float64 total and one float32 sum of the batches since it was last brought up to date.
_BYTES_PER_ELEMENT = 12
# A Gram matrix is symmetric: of its columns in four slabs, ten sixteenths of the products are enough.
_SLABS = 4


@dataclass(frozen=True)
class Unit:
    """Experts ``first`` to ``last`` (exclusive) of one input of width ``n``: what a pass can take on."""

    input: str
    n: int
    first: int
    last: int

    @property
    def size_bytes(self) -> int:
        return (self.last - self.first) * self.n * self.n * _BYTES_PER_ELEMENT


def plan_passes(inputs: Mapping[str, tuple[int, int]], memory_bytes: int) -> list[list[Unit]]:
    """Passes over the text that each keep within ``memory_bytes``; ``inputs[name]`` = (width, n_expert).

    Raises DoesNotFitError where one matrix alone is larger.
    """
    passes: list[list[Unit]] = [[]]
    left = memory_bytes
    for name, (n, n_expert) in inputs.items():
        one = n * n * _BYTES_PER_ELEMENT
        if one > memory_bytes:
            raise DoesNotFitError(
                f"the covariance of {name} takes {one / 1e9:.2f} GB, more than {memory_bytes / 1e9:.2f} GB",
                fix=f"give --covariance-memory {-(-one // 10**6)}M",
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

    Batches are summed in float32 on the GPU where torch has one; totals are float64 in host memory, brought up to
    date at every checkpoint: float32 alone would lose the small batch beside the large sum.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = {unit.input: unit for unit in units}
        self.totals = {u.input: np.zeros((u.last - u.first, u.n, u.n)) for u in units}
        self._recent: dict[str, torch.Tensor] = {}
        self._device = _device()

    @property
    def inputs(self) -> Collection[str]:
        return self.units.keys()

    def take(self, activation: Activation) -> None:
        """Add the Gram matrix of one input of one batch."""
        import torch

        unit = self.units[activation.weight]
        if unit.input not in self._recent:
            shape = (unit.last - unit.first, unit.n, unit.n)
            self._recent[unit.input] = torch.zeros(shape, dtype=torch.float32, device=self._device)
        sums = self._recent[unit.input]
        if activation.experts is None:
            _add_gram(sums[0], torch.from_numpy(np.ascontiguousarray(activation.x)).to(self._device))
            return
        for expert, rows in rows_by_expert(activation.x, activation.experts):
            if unit.first <= expert < unit.last:
                _add_gram(sums[expert - unit.first], torch.from_numpy(rows).to(self._device))

    def settle(self) -> None:
        """Move the recent sums into the totals."""
        for name, recent in self._recent.items():
            self.totals[name] += recent.cpu().numpy()
            recent.zero_()

    def state(self) -> Mapping[str, npt.NDArray[np.float64]]:
        return self.totals

    def restore(self, state: Mapping[str, npt.NDArray[np.float64]]) -> None:
        for name, array in state.items():
            self.totals[name] = array

    def write(self, folder: Path) -> None:
        """The unit's matrices into ``folder``, one file a unit."""
        for name, unit in self.units.items():
            with atomic_path(folder / _file_name(unit)) as temporary, temporary.open("wb") as stream:
                np.save(stream, _pack(self.totals[name]))


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


def _pack(square: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Lower triangles [n_expert, n·(n+1)/2] of ``square`` [n_expert, n, n]."""
    lower = np.tri(square.shape[-1], dtype=bool)
    return np.stack([one[lower].astype(np.float32) for one in square])


def _unpack(packed: npt.NDArray[np.float32], n: int) -> npt.NDArray[np.float32]:
    square = np.zeros((n, n), dtype=np.float32)
    lower = np.tri(n, dtype=bool)
    square[lower] = packed
    square.T[lower] = packed
    return square


def _file_name(unit: Unit) -> str:
    return f"{unit.input}.{unit.n}.{unit.first}-{unit.last}.npy"


_FILE_NAME = re.compile(r"(?P<input>.+)\.(?P<n>\d+)\.(?P<first>\d+)-(?P<last>\d+)\.npy")


@dataclass(frozen=True)
class Covariance:
    """The matrices on disk. ``input_of[weight]`` names the input that a weight shares; ``counts`` as the imatrix's."""

    folder: Path
    input_of: Mapping[str, str]

    def matrix(self, weight: str, expert: int = 0) -> npt.NDArray[np.float32]:
        """Σxxᵀ [n, n] of the input of ``weight``, float32, symmetric. Raises NotFoundError where it has none."""
        wanted = self.input_of.get(weight)
        for path, unit in self._units():
            if unit.input == wanted and unit.first <= expert < unit.last:
                packed: npt.NDArray[Any] = np.load(path, mmap_mode="r")[expert - unit.first]
                return _unpack(packed, unit.n)
        raise NotFoundError(f"no covariance of {weight} (expert {expert}) in {self.folder}")

    def _units(self) -> Iterable[tuple[Path, Unit]]:
        for path in sorted(self.folder.glob("*.npy")):
            if match := _FILE_NAME.fullmatch(path.name):
                yield path, Unit(match["input"], int(match["n"]), int(match["first"]), int(match["last"]))


def is_written(unit: Unit, folder: Path) -> bool:
    """Whether an earlier run finished the pass that ``unit`` is in."""
    return (folder / _file_name(unit)).is_file()
