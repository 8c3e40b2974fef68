"""One pass of token sequences through the reference, its weights' inputs summed up on the way, resumable.

Takes a loaded engine, batches of token sequences and the sums to fill; gives nothing back but filled sums. Knows no
file format but that of its own checkpoints. Sums and their order depend on the batches alone, never on where a run was
killed: what a resumed run ends with is the same to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from dynrun.artifacts import atomic_path
from dynrun.calibration.imatrix import Imatrix
from dynrun.errors import DynrunError
from dynrun.llamacpp.engine import Engine, Tokens
from dynrun.llamacpp.graph import Activation

if TYPE_CHECKING:
    from dynrun.calibration.relay import Relay

Sums = npt.NDArray[np.float64]
Batch = Sequence[Tokens]
# Checkpoints lie between batches whose number is a multiple of this.
CHECKPOINT_BATCHES = 8
# A checkpoint is written when the last one is this old, and so old that writing takes at most a twentieth.
_CHECKPOINT_S, _CHECKPOINT_SHARE = 30.0, 20.0


class Accumulator(Protocol):
    """What is summed over the inputs of one pass."""

    @property
    def inputs(self) -> Collection[str]:
        """The inputs wanted (:attr:`Engine.input_of`)."""

    def take(self, activation: Activation) -> None:
        """Add one input of one batch."""

    def begin(self, batch: int) -> None:
        """Called before batch number ``batch`` is decoded."""

    def state(self) -> Mapping[str, npt.NDArray[Any]]:
        """All that has been summed, exactly."""

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what :meth:`state` gave. Raises KeyError, before anything is taken, where it is another pass's."""


@dataclass
class SquareSums:
    """Σx² per column and expert [n_expert, ne0] in float64, and the number of rows summed [n_expert]."""

    n_expert: Mapping[str, int]
    sums: dict[str, Sums] = field(default_factory=dict)
    counts: dict[str, Sums] = field(default_factory=dict)

    @property
    def inputs(self) -> Collection[str]:
        return self.n_expert.keys()

    def take(self, activation: Activation) -> None:
        """Add the squares of one input: a batch is summed in float32 (to 1e-6), batches in float64."""
        name, x = activation.weight, activation.x
        if name not in self.sums:
            experts = self.n_expert[name]
            self.sums[name], self.counts[name] = np.zeros((experts, x.shape[-1])), np.zeros(experts)
        if activation.experts is None:
            self.sums[name][0] += np.einsum("ij,ij->j", x, x)
            self.counts[name][0] += len(x)
            return
        for expert, rows in rows_by_expert(x, activation.experts):
            self.sums[name][expert] += np.einsum("ij,ij->j", rows, rows)
            self.counts[name][expert] += len(rows)

    def begin(self, batch: int) -> None:
        """All batches are alike."""

    def state(self) -> dict[str, Sums]:
        return {f"sums/{n}": a for n, a in self.sums.items()} | {f"counts/{n}": a for n, a in self.counts.items()}

    def restore(self, state: Mapping[str, Sums]) -> None:
        for key, array in state.items():
            kind, _, name = key.partition("/")
            if kind in ("sums", "counts"):
                getattr(self, kind)[name] = array

    def least_expert_tokens(self) -> float:
        """Tokens that the least visited expert of all has seen; infinity without experts."""
        return min((c.min() for c in self.counts.values() if len(c) > 1), default=np.inf)

    def check(self, path: Path) -> None:
        """Raise DynrunError where an activation of the model at ``path`` was not finite."""
        for name, sums in self.sums.items():
            if not np.isfinite(sums).all():
                raise DynrunError(f"the activations of {name} in {path} are not finite", fix="the model is damaged")

    def imatrix(self, input_of: Mapping[str, str]) -> Imatrix:
        """An entry for every weight, those with a common input sharing its sums."""
        known = {name: first for name, first in input_of.items() if first in self.sums}
        return Imatrix(
            {name: self.sums[first] for name, first in known.items()},
            {name: self.counts[first] for name, first in known.items()},
        )


def rows_by_expert(
    x: npt.NDArray[np.float32], experts: npt.NDArray[np.int32]
) -> list[tuple[int, npt.NDArray[np.float32]]]:
    """The rows of each expert that has any, in the order they came."""
    order = np.argsort(experts, kind="stable")
    found, starts = np.unique(experts[order], return_index=True)
    return list(zip(found.tolist(), np.split(x[order], starts[1:]), strict=True))


@dataclass(frozen=True)
class Pass:
    """``n_batches`` were decoded, ``n_tokens`` in all; ``elapsed_s`` of this run alone, over ``new_tokens``."""

    n_batches: int
    n_tokens: int
    new_tokens: int
    elapsed_s: float

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.elapsed_s if self.elapsed_s else 0.0


class _Stored(Mapping[str, npt.NDArray[Any]]):
    """The arrays of one accumulator in a checkpoint, read when they are asked for: all of them at once, beside the sums
    that they replace, would take twice the memory."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], prefix: str) -> None:
        self._arrays, self._prefix = arrays, prefix

    def __getitem__(self, key: str) -> npt.NDArray[Any]:
        return self._arrays[self._prefix + key]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self._prefix) for key in self._arrays if key.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass
class Checkpoint:
    """The file of one pass's sums so far. A damaged one is no checkpoint: the pass begins anew."""

    path: Path
    every_s: float = _CHECKPOINT_S
    _saved_at: float = field(default_factory=time.monotonic)
    _took_s: float = 0.0

    def load(self, accumulators: Sequence[Accumulator]) -> int:
        """Restore what is there, one array after the other; the number of batches in it."""
        try:
            with np.load(self.path) as arrays:
                done = int(arrays["done"])
                # Whole before the first array is taken: what is half restored could not begin anew.
                if int(arrays["accumulators"]) != len(accumulators) or arrays.zip.testzip() is not None:
                    return 0
                for i, accumulator in enumerate(accumulators):
                    accumulator.restore(_Stored(arrays, f"{i}:"))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return 0
        return done

    def save_if_due(self, done: int, accumulators: Sequence[Accumulator]) -> None:
        """Write the sums after ``done`` batches, atomically, unless that was done a moment ago."""
        started = time.monotonic()
        if started - self._saved_at < max(self.every_s, self._took_s * _CHECKPOINT_SHARE):
            return
        state: dict[str, Any] = {f"{i}:{k}": v for i, a in enumerate(accumulators) for k, v in a.state().items()}
        with atomic_path(self.path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, done=np.array(done), accumulators=np.array(len(accumulators)), **state)
        self._saved_at = time.monotonic()
        self._took_s = self._saved_at - started


def run_pass(
    engine: Engine,
    batches: Sequence[Batch],
    accumulators: Sequence[Accumulator],
    checkpoint: Checkpoint,
    *,
    enough: Callable[[int], bool] = lambda _: False,
    progress: Callable[[int], None] = lambda _: None,
    relay: Relay | None = None,
) -> Pass:
    """Decode ``batches`` in order until they end or ``enough(number done)``; fill ``accumulators``.

    ``progress`` gets the tokens done. With ``relay`` batches go on from where the pass before left them.
    """
    begun = done = checkpoint.load(accumulators)
    sizes = [sum(len(tokens) for tokens in batch) for batch in batches]
    n_tokens, started = sum(sizes[:done]), time.monotonic()
    wanted = frozenset().union(*(a.inputs for a in accumulators))
    takers = {name: [a for a in accumulators if name in a.inputs] for name in wanted}

    def take(activation: Activation) -> None:
        for accumulator in takers[activation.weight]:
            accumulator.take(activation)

    while done < len(batches) and not enough(done):
        for accumulator in accumulators:
            accumulator.begin(done)
        if relay is None:
            engine.watch_inputs(batches[done], take, wanted)
        else:
            relay.watch(engine, done, batches[done], take, wanted)
        n_tokens, done = n_tokens + sizes[done], done + 1
        if done % CHECKPOINT_BATCHES == 0:
            checkpoint.save_if_due(done, accumulators)
        progress(n_tokens)
    return Pass(done, n_tokens, sum(sizes[begun:done]), time.monotonic() - started)


def inputs_of(engine: Engine) -> dict[str, int]:
    """The inputs of the engine's weights, each with its number of experts (1 for dense weights)."""
    firsts = dict.fromkeys(engine.input_of.values())
    shapes = {name: engine.weights[name].shape for name in firsts}
    return {name: shape[2] if len(shape) > 2 else 1 for name, shape in shapes.items()}
