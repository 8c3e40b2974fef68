"""Replace tensors in the loaded model and measure the divergence.

Work before the first replaced tensor's layer is not repeated: the model's activations at the end of the layer before it
were kept, and decoding goes on from there (engine.resume). How far in this gives the same logits is found on the model
at hand before it is relied on. Decides nothing about what is worth a measurement (adaptive.py, allocation/search.py).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dynrun.calibration.sequences import TokenSequence
from dynrun.gguf.weights import encode
from dynrun.llamacpp.engine import Engine, Logits, Prefix
from dynrun.scoring.divergence import divergence
from dynrun.sensitivity.errors import Quantizer
from dynrun.sensitivity.in_place import quantized, stored_as


@dataclass(frozen=True)
class Job:
    """A measurement to make: tensors → the type put in their place, on sequences [first, last)."""

    name: str
    types: dict[str, str]
    first: int
    last: int


@dataclass(frozen=True)
class Probe:
    """A job's result: the error of each tensor in its type; of each sequence the mean KLD in ``klds`` (nats per token),
    and its scored tokens in ``weights``."""

    name: str
    types: dict[str, str]
    first: int
    errors: list[float]
    klds: list[float]
    weights: list[int]
    forward_s: float
    elapsed_s: float

    @property
    def kld(self) -> float:
        """Mean over all tokens."""
        return float(np.average(self.klds, weights=self.weights))

    @property
    def error(self) -> float:
        """Sum of the tensors' errors."""
        return sum(self.errors)


class Probes(Protocol):
    """What carries out jobs: this process, or several workers. Probes come in the order they are ready."""

    def run(self, jobs: Iterable[Job]) -> Iterator[Probe]: ...


class Sweep:
    """Probes of one loaded model on fixed sequences. The reference is the model as it is when this is made."""

    def __init__(self, engine: Engine, quantizer: Quantizer, sequences: Sequence[TokenSequence]) -> None:
        self.engine, self.quantizer = engine, quantizer
        self.sequences = sequences
        self._prefixes: list[Prefix] = []
        self._reference: list[Logits] = []
        for sequence in sequences:
            prefix, logits = self._record(sequence)
            self._prefixes.append(prefix)
            self._reference.append(logits)
        layers = [int(name.removeprefix("l_out-")) for name in self._prefixes[0].values]
        self._last_layer = max(layers, default=-1)
        self.furthest = self._furthest_exact()

    def _record(self, sequence: TokenSequence) -> tuple[Prefix, Logits]:
        # The last token's successor is unknown, but its prediction is as good a sample of the divergence as any.
        return self.engine.record(sequence.tokens, range(len(sequence.tokens)))

    def _furthest_exact(self) -> int:
        """The last layer behind which a decode may go on; -1 for none.

        Where layers read the caches of earlier ones (gemma3n, gemma4), these may not be left out.
        """
        layer = self._last_layer - 1
        while layer >= 0:
            if self._goes_on(layer):
                return layer
            layer = layer // 2 or -1
        return -1

    def _goes_on(self, layer: int) -> bool:
        """Whether going on behind ``layer`` gives the logits of a full decode, with a weight replaced behind it."""
        names = [n for n in self.engine.weights if n.startswith(f"blk.{layer + 1}.") and self._can_replace(n)]
        if not names:
            return False
        prefix, name = self._prefixes[0], names[-1]
        changed = self.quantizer.weights.rows(name) * np.float32(1.02)
        with self.engine.replaced(name, encode(changed, stored_as(self.engine, name) or "")):
            whole = self.engine.logits(prefix.tokens, prefix.outputs)
            # Or what it left in the caches would be found there.
            self.engine.forget(erase=True)
            resumed = self.engine.resume(prefix, layer)
        return bool(divergence(whole, resumed).kld.max() < 1e-9)

    def _can_replace(self, name: str) -> bool:
        return stored_as(self.engine, name) is not None and len(self.engine.weights[name].shape) > 1

    def run(self, job: Job) -> Probe:
        """Mean KLD of the job's sequences with its tensors replaced, the rest of the model as it stands."""
        started = time.perf_counter()
        klds, weights, errors, forward = [], [], [], 0.0
        layer = min(self._layer_before(name) for name in job.types)
        with ExitStack() as stack:
            for name, type_name in job.types.items():
                data, error = quantized(self.engine, self.quantizer, name, type_name)
                errors.append(error)
                stack.enter_context(self.engine.replaced(name, data))
            for i in range(job.first, job.last):
                begun = time.perf_counter()
                logits = self.engine.resume(self._prefixes[i], layer)
                forward += time.perf_counter() - begun
                klds.append(float(divergence(self._reference[i], logits).kld.mean()))
                weights.append(len(logits))
        elapsed = time.perf_counter() - started
        return Probe(job.name, job.types, job.first, errors, klds, weights, forward, elapsed)

    def _layer_before(self, tensor: str) -> int:
        if match := re.match(r"blk\.(\d+)\.", tensor):
            return min(int(match[1]) - 1, self.furthest)
        # Behind the last layer nothing reads a cache.
        return self._last_layer if tensor == "output.weight" and self.furthest >= 0 else -1


@dataclass(frozen=True)
class LocalProbes:
    """Jobs carried out one after the other in this process."""

    sweep: Sweep

    def run(self, jobs: Iterable[Job]) -> Iterator[Probe]:
        """The jobs' probes, in the jobs' order."""
        for job in jobs:
            yield self.sweep.run(job)
