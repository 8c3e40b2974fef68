"""What one pass over the text leaves for the next one: the output of the layer that it goes on from, of every batch.

Passes want the inputs of some layers each, in the order of the graph: all of them together then compute every layer
once, however many there are. Sums up nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynrun.artifacts import atomic_path
from dynrun.calibration.covariance import Unit
from dynrun.calibration.imatrix_stats import block_and_kind
from dynrun.gguf.quantizable import is_mtp
from dynrun.llamacpp.engine import Engine, Tokens
from dynrun.llamacpp.graph import Activation, LayerOutput

# Of two sequences in one batch, on which it is tried whether a model can go on from a layer.
_TRIED_TOKENS = 16


@dataclass(frozen=True)
class Relay:
    """A pass that goes on behind layer ``start`` and leaves the output of ``then``, from which the next one does; None:
    from the tokens."""

    folder: Path
    start: int | None = None
    then: int | None = None

    @property
    def keep(self) -> int | None:
        """The layer whose output is still to be written."""
        return self.then if self.then != self.start else None

    def watch(
        self,
        engine: Engine,
        number: int,
        batch: Sequence[Tokens],
        consume: Callable[[Activation], None],
        only: Collection[str],
    ) -> None:
        """As :meth:`Engine.watch_inputs` does, from where the pass before left batch ``number`` of the text."""
        self._leave(number, engine.watch_inputs(batch, consume, only, start=self._taken(number), keep=self.keep))

    def _taken(self, batch: int) -> LayerOutput | None:
        """None where it is not there, and the batch must begin anew."""
        if self.start is None:
            return None
        try:
            return LayerOutput(self.start, np.load(self._path(self.start, batch)))
        except (OSError, ValueError, EOFError):
            return None

    def _leave(self, batch: int, output: LayerOutput | None) -> None:
        if output is None:
            return
        path = self._path(output.layer, batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, output.value)

    def end(self) -> None:
        """The pass is over: what it went on from is of no use any more."""
        if self.start is not None and self.start != self.then:
            shutil.rmtree(self._path(self.start, 0).parent, ignore_errors=True)

    def _path(self, layer: int, batch: int) -> Path:
        return self.folder / f"layer-{layer}" / f"{batch}.npy"


def relays(engine: Engine, passes: Sequence[Sequence[Unit]], batch: Sequence[Tokens], folder: Path) -> list[Relay]:
    """One for each of ``passes``; ``batch`` is one of theirs, of which some tokens are tried."""
    starts: list[int | None] = [None]
    last = max((block for units in passes for block in _blocks(engine, units)), default=-1)
    for units in passes[1:]:
        layer = min(_blocks(engine, units), default=last + 1) - 1
        inputs = {unit.input for unit in units}
        starts.append(layer if layer >= 0 and can_go_on(engine, layer, inputs, batch) else None)
    return [Relay(folder, start, then) for start, then in zip(starts, [*starts[1:], None], strict=True)]


def _blocks(engine: Engine, units: Sequence[Unit]) -> list[int]:
    """The layers of the inputs, without MTP blocks: these go on from the model's end."""
    names = [unit.input for unit in units if not is_mtp(unit.input, engine.header.metadata)]
    return [block for block, _ in map(block_and_kind, names) if block is not None]


def can_go_on(engine: Engine, layer: int, inputs: Collection[str], batch: Sequence[Tokens]) -> bool:
    """Whether ``inputs`` are the same to the last bit where a batch goes on behind ``layer``.

    They are not where something behind it reads what layers before it wrote elsewhere, as caches that layers share.
    """
    short = [list(tokens[:_TRIED_TOKENS]) for tokens in batch[:2]]
    whole, kept = _seen(engine, short, inputs, keep=layer)
    if kept is None:
        return False
    # Or what it left in the caches would be found there.
    engine.forget(erase=True)
    again, _ = _seen(engine, short, inputs, start=kept)
    return len(whole) == len(again) and all(map(_same, whole, again))


def _seen(
    engine: Engine,
    batch: Sequence[Tokens],
    inputs: Collection[str],
    *,
    start: LayerOutput | None = None,
    keep: int | None = None,
) -> tuple[list[Activation], LayerOutput | None]:
    found: list[Activation] = []
    kept = engine.watch_inputs(batch, found.append, inputs, start=start, keep=keep)
    return found, kept


def _same(one: Activation, other: Activation) -> bool:
    if one.experts is None or other.experts is None:
        routed = one.experts is other.experts
    else:
        routed = np.array_equal(one.experts, other.experts)
    return one.weight == other.weight and routed and np.array_equal(one.x, other.x)
