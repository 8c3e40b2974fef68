"""What feedback reads of a tensor: its rows, the statistics of its input, and the factor that both give.

One covariance is in memory at a time, with the factors made of it: tensors that share an input come one after another.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dynrun.calibration.covariance import Covariance
from dynrun.calibration.imatrix import Imatrix
from dynrun.errors import DoesNotFitError
from dynrun.gguf.weights import WeightFile
from dynrun.rounding.factor import Factor, factor
from dynrun.rounding.settings import FeedbackSettings

Rows = npt.NDArray[np.float32]
_KEPT = 4
# Matrices of the input's width, float32, that a factor is, and that are there while one is made: the covariance, as it
# is read and whole, and what the decomposition takes. With experts one more, their layer's.
_FACTOR_MATRICES, _WORK_MATRICES = 2, 6


@dataclass
class Source:
    """A model's weights with the imatrix and the covariance of their inputs.

    ``memory``: bytes that the covariance at hand and its factors may take, None for what it needs.
    """

    weights: WeightFile
    imatrix: Imatrix
    covariance: Covariance
    settings: FeedbackSettings
    device: str = "cpu"
    memory: int | None = None
    _input: tuple[str, int] | None = None
    _matrix: Rows | None = None
    _n_rows: float = 0.0
    _layer: tuple[str, Rows] | None = None
    _factors: dict[tuple[float, int], Factor] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether there is a covariance for the tensor, and an imatrix entry."""
        return name in self.covariance.input_of and name in self.imatrix.sums

    def n_expert(self, name: str) -> int:
        """Matrices in a tensor."""
        return math.prod(self.weights.header.tensors[name].shape[2:])

    def rows(self, name: str, expert: int, index: npt.NDArray[np.int64] | None = None) -> Rows:
        """Rows of one expert's matrix, all of them or some."""
        each = self.weights.n_rows(name) // self.n_expert(name)
        if index is None:
            return self.weights.rows(name, slice(expert * each, (expert + 1) * each))
        return self.weights.rows(name, expert * each + index)

    def some(self, name: str, expert: int, n: int) -> Rows:
        """Up to ``n`` rows of one expert's matrix, evenly spaced."""
        each = self.weights.n_rows(name) // self.n_expert(name)
        n = min(n, each)
        return self.rows(name, expert, ((np.arange(n) + 0.5) * each / n).astype(np.int64))

    def importance(self, name: str, expert: int) -> Rows:
        """Mean of x² [n], as llama-quantize reads it from the imatrix."""
        mean = self.imatrix.mean(name)
        assert mean is not None
        return np.ascontiguousarray(mean[expert], dtype=np.float32)

    def held_out(self, name: str, expert: int) -> Rows:
        """Rows [m, n] of the input that no covariance has seen."""
        return self.covariance.held_out(name, expert)

    def most_seen(self, name: str, n: int) -> Sequence[int]:
        """The up to ``n`` experts with the most held-out rows."""
        seen = [len(self.held_out(name, expert)) for expert in range(self.n_expert(name))]
        return sorted(int(e) for e in np.argsort(np.negative(seen), kind="stable")[:n] if seen[e])

    def factor(self, name: str, expert: int, strength: float, width: int) -> Factor:
        """The factor of the input's covariance, shrunk by ``strength``; slabs of ``width`` columns, those of most
        energy first: later ones make up for their errors."""
        key = (self.covariance.input_of[name], expert)
        if key != self._input:
            self._factors.clear()
            self._input, self._matrix, self._n_rows = key, *self._mixed(name, expert)
        assert self._matrix is not None
        if (strength, width) not in self._factors:
            n = len(self._matrix)
            most = min(_KEPT, self.most_factors(name))
            while len(self._factors) >= most:
                self._factors.pop(next(iter(self._factors)))
            shrink = self.settings.shrinkage(strength, n, self._n_rows)
            energy = np.diag(self._matrix).reshape(-1, width).sum(axis=1, dtype=np.float64)
            slabs = np.argsort(-energy, kind="stable")
            order = (slabs[:, None] * width + np.arange(width)).reshape(-1)
            made = factor(self._matrix, self.settings.damping, order, shrink=shrink, device=self.device)
            self._factors[strength, width] = made
        return self._factors[strength, width]

    def _mixed(self, name: str, expert: int) -> tuple[Rows, float]:
        """The covariance, a sum, and the rows in it: with as many of the layer's mean as the imatrix has."""
        own, n_rows = self.covariance.matrix(name, expert), self.covariance.count(name, expert)
        mixed = self.imatrix.counts[name] - self.imatrix.seen[name]
        if not mixed.any():
            return own, n_rows
        added = float(mixed[expert])
        shared = self.covariance.input_of[name]
        if self._layer is None or self._layer[0] != shared:
            # The former is let go of first: of a wide input one takes a gigabyte.
            self._layer = None
            self._layer = shared, self.covariance.layer_mean(name)
        own += np.float32(added) * self._layer[1]
        return own, n_rows + added

    def most_factors(self, name: str) -> int:
        """How many factors of a tensor's input may be there at once: of a wide one each takes a gigabyte.

        Raises DoesNotFitError where ``memory`` is too little for one.
        """
        if self.memory is None:
            return sys.maxsize
        n = self.weights.header.tensors[name].shape[0]
        one = n * n * 4
        needed = (_WORK_MATRICES + (self.n_expert(name) > 1)) * one
        most = (self.memory - needed) // (_FACTOR_MATRICES * one) + 1
        if most < 1:
            raise DoesNotFitError(
                f"rounding {name} takes {needed / 1e9:.2f} GB, more than {self.memory / 1e9:.2f} GB",
                fix=f"give --memory {-(-needed // 10**6)}M, or --no-feedback",
            )
        return most
