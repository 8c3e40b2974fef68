"""What a type's kernels do to activations, which no round trip of the weights shows.

On the CPU a quantized weight is multiplied by activations that are quantized too, to 8 bits: for types with blocks of
256 columns with one scale for 256 values (Q8_K), for the others with one for 32 (Q8_0, Q8_1): vec_dot_type in
ggml/src/ggml-cpu/ggml-cpu.c. Where one value of a block is massive the others are lost. The relative error of a
weight's output from that, averaged over tokens, is compared with that from its own rounding in a probed type, whose
KLD is known: in the same proportion it is taken to cost. GPUs use blocks of 32 for all types, or do not quantize
activations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dynrun.calibration.sequences import TokenSequence
from dynrun.gguf.tensor_types import FULL_PRECISION, TENSOR_TYPES
from dynrun.llamacpp.engine import Engine
from dynrun.llamacpp.graph import Activation
from dynrun.sensitivity.errors import Quantizer

Rows = npt.NDArray[np.float32]
_WIDE, _NARROW = 256, 32
_MAX_ROWS = 512
_TINY = 1e-30


def activation_block(type_name: str) -> int:
    """Columns that share a scale where the CPU quantizes the activations for a weight of this type; 0: it does not."""
    if type_name in FULL_PRECISION:
        return 0
    return _WIDE if TENSOR_TYPES[type_name].block_size == _WIDE else _NARROW


def relative_costs(
    engine: Engine, quantizer: Quantizer, sequences: Sequence[TokenSequence], probed: Mapping[str, str]
) -> dict[str, dict[int, float]]:
    """For each weight in ``probed`` (→ a type it was probed in) and each block of activations that its row allows: the
    output's error from quantizing the activations, over that from the weight in that type. Of the order of 1e-3 to 10.

    A weight that multiplies nothing (token_embd) has no entry.
    """
    inputs = _inputs(engine, sequences, probed)
    found = {}
    for name, type_name in probed.items():
        if name in engine.input_of and (taken := inputs.get(engine.input_of[name])):
            found[name] = _costs_of(quantizer, name, type_name, taken)
    return found


def _inputs(engine: Engine, sequences: Sequence[TokenSequence], names: Iterable[str]) -> dict[str, list[Activation]]:
    """What the weights read, by the name of the first that reads it."""
    wanted = {engine.input_of[name] for name in names if name in engine.input_of}
    found: defaultdict[str, list[Activation]] = defaultdict(list)

    def consume(activation: Activation) -> None:
        # The rows are views of the graph's memory, which the next node may overwrite.
        experts = None if activation.experts is None else activation.experts.copy()
        found[activation.weight].append(Activation(activation.weight, np.array(activation.x), experts))

    for sequence in sequences:
        engine.watch_inputs([sequence.tokens], consume, only=wanted)
    return found


def _costs_of(quantizer: Quantizer, name: str, type_name: str, taken: Sequence[Activation]) -> dict[int, float]:
    x = np.concatenate([one.x for one in taken])
    experts = (
        None if taken[0].experts is None else np.concatenate([e for one in taken if (e := one.experts) is not None])
    )
    blocks = [block for block in (_NARROW, _WIDE) if x.shape[1] % block == 0]
    lost: dict[int, list[Rows]] = {block: [] for block in (0, *blocks)}
    for expert, original, rounded in quantizer.some_rows(name, type_name, _MAX_ROWS):
        own = x if experts is None else x[experts == expert]
        if not len(own):
            continue
        whole = np.square(own @ original.T).sum(axis=1) + _TINY
        lost[0].append(np.square(own @ (original - rounded).T).sum(axis=1) / whole)
        for block in blocks:
            lost[block].append(np.square((own - _in_8_bits(own, block)) @ original.T).sum(axis=1) / whole)
    if not lost[0]:
        return {}
    of_weights = float(np.mean(np.concatenate(lost[0])))
    return {block: float(np.mean(np.concatenate(lost[block]))) / max(of_weights, _TINY) for block in blocks}


def _in_8_bits(x: Rows, block: int) -> Rows:
    """``x`` [n, ne0] as quantize_row_q8_K or q8_0 and back: one scale, the largest magnitude over 127, a block."""
    parts = x.reshape(len(x), -1, block)
    scale = np.abs(parts).max(axis=2, keepdims=True) / np.float32(127)
    steps = np.divide(parts, scale, out=np.zeros_like(parts), where=scale > 0)
    found: Rows = (np.rint(steps) * scale).reshape(x.shape)
    return found
