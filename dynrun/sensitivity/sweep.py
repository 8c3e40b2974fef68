"""Replace one tensor at a time in the loaded model and measure the divergence.

Work before the replaced tensor's layer is not repeated: the reference's activations at the end of the layer before it
were kept, and decoding goes on from there (engine.resume). That this gives the same logits is checked on the model at
hand before it is relied on.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dynrun.calibration.sequences import TokenSequence
from dynrun.gguf.weights import encode
from dynrun.llamacpp.engine import Engine, Logits, Prefix
from dynrun.scoring.divergence import divergence
from dynrun.sensitivity.errors import Quantizer
from dynrun.sensitivity.slopes import Slope

_TYPE_NAMES = {0: "F32", 1: "F16", 30: "BF16"}


@dataclass(frozen=True)
class Probe:
    """One measurement: the mean KLD of each sequence in ``klds`` (nats per token), ``weights`` their scored tokens."""

    tensor: str
    type: str
    error: float
    klds: list[float]
    weights: list[int]
    forward_s: float
    elapsed_s: float


@dataclass(frozen=True)
class Progress:
    """What a probe's line in the log says."""

    done: int
    total: int
    probe: Probe

    @property
    def kld(self) -> float:
        return float(np.average(self.probe.klds, weights=self.probe.weights))


@dataclass
class _Reference:
    prefix: Prefix
    logits: Logits


def probe_types(row_length: int) -> tuple[str, str]:
    """The coarse and the fine type that a tensor is measured at."""
    return ("Q3_K", "Q5_K") if row_length % 256 == 0 else ("Q4_0", "Q5_0")


class Sweep:
    """Probes of one loaded model on fixed sequences."""

    def __init__(self, engine: Engine, quantizer: Quantizer, sequences: Sequence[TokenSequence]) -> None:
        self.engine, self.quantizer = engine, quantizer
        self._references = [self._record(sequence.tokens) for sequence in sequences]
        layers = [int(name.removeprefix("l_out-")) for name in self._references[0].prefix.values]
        self._last_layer = max(layers, default=-1)
        self.reuses = self._reuse_is_exact()

    def _record(self, tokens: Sequence[int]) -> _Reference:
        # The last token's successor is unknown, but its prediction is as good a sample of the divergence as any.
        prefix, logits = self.engine.record(tokens, range(len(tokens)))
        return _Reference(prefix, logits)

    def _reuse_is_exact(self) -> bool:
        """Whether going on from the middle gives the logits of a full decode, with a weight replaced after it."""
        middle = self._last_layer // 2
        names = [n for n in self.engine.weights if n.startswith(f"blk.{middle + 1}.") and self._can_replace(n)]
        if middle < 0 or not names:
            return False
        reference = self._references[0]
        name = names[-1]
        changed = self.quantizer.weights.rows(name) * np.float32(1.02)
        with self.engine.replaced(name, encode(changed, self._stored_as(name))):
            whole = self.engine.logits(reference.prefix.tokens, reference.prefix.outputs)
            resumed = self.engine.resume(reference.prefix, middle)
        return bool(divergence(whole, resumed).kld.max() < 1e-9)

    def _can_replace(self, name: str) -> bool:
        weight = self.engine.weights[name]
        return weight.type_id in _TYPE_NAMES and len(weight.shape) > 1

    def _stored_as(self, name: str) -> str:
        return _TYPE_NAMES[self.engine.weights[name].type_id]

    def probe(self, tensor: str, type_name: str, n_sequences: int) -> Probe:
        """Mean KLD of the first ``n_sequences`` sequences with ``tensor`` alone in ``type_name``."""
        started = time.perf_counter()
        replacement = self.quantizer.replacement(tensor, type_name)
        data = encode(replacement.values, self._stored_as(tensor))
        klds, weights, forward = [], [], 0.0
        with self.engine.replaced(tensor, data):
            for reference in self._references[:n_sequences]:
                begun = time.perf_counter()
                logits = self.engine.resume(reference.prefix, self._layer_before(tensor))
                forward += time.perf_counter() - begun
                klds.append(float(divergence(reference.logits, logits).kld.mean()))
                weights.append(len(logits))
        elapsed = time.perf_counter() - started
        return Probe(tensor, type_name, replacement.error, klds, weights, forward, elapsed)

    def _layer_before(self, tensor: str) -> int:
        if not self.reuses:
            return -1
        if match := re.match(r"blk\.(\d+)\.", tensor):
            return int(match[1]) - 1
        return self._last_layer if tensor == "output.weight" else -1


class ProbeLog:
    """Finished probes on disk, a JSON line each; a line torn by a kill is dropped and measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.probes: dict[tuple[str, str], Probe] = {}
        if path.is_file():
            self._read()

    def _read(self) -> None:
        whole = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                probe = Probe(**json.loads(line))
            except (ValueError, TypeError):
                continue
            self.probes[probe.tensor, probe.type] = probe
            whole.append(line)
        self.path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")

    def add(self, probe: Probe) -> None:
        """Keep ``probe``, on disk before this returns."""
        self.probes[probe.tensor, probe.type] = probe
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(probe)) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def run_sweep(
    sweep: Sweep,
    shapes: Mapping[str, tuple[int, ...]],
    log: ProbeLog,
    *,
    n_coarse: int,
    n_fine: int,
    progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Slope]:
    """Slopes of the tensors in ``shapes`` (ggml order), the two types on ``n_coarse`` and ``n_fine`` sequences.

    The fine KLD is the coarse one times the ratio of the two on the shared sequences: both are moved alike by which
    tokens happen to be in the sample, so their ratio needs fewer of them.
    """
    todo = [
        (name, t, n)
        for name, shape in shapes.items()
        for t, n in zip(probe_types(shape[0]), (n_coarse, n_fine), strict=True)
    ]
    for done, (name, type_name, n) in enumerate(todo, start=1):
        if (name, type_name) not in log.probes:
            log.add(sweep.probe(name, type_name, n))
        progress(Progress(done, len(todo), log.probes[name, type_name]))
    return {name: slope_of(*(log.probes[name, t] for t in probe_types(shape[0]))) for name, shape in shapes.items()}


def slope_of(coarse: Probe, fine: Probe) -> Slope:
    """The two points of one tensor, the fine one put on all of the coarse one's sequences by their ratio."""
    whole = float(np.average(coarse.klds, weights=coarse.weights))
    n = len(fine.klds)
    shared = float(np.average(coarse.klds[:n], weights=coarse.weights[:n]))
    measured = float(np.average(fine.klds, weights=fine.weights))
    scaled = measured * whole / shared if shared > 0 else measured
    return Slope(coarse=(coarse.error, whole), fine=(fine.error, scaled))
