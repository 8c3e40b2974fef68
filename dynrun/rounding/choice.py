"""How strongly a tensor's covariance is to be trusted, and what feedback then gives, by held-out activations.

Takes a tensor and a type, rounds some of its rows with and without feedback, and compares the errors of the layer's
output, Σ (x·(w−q))², on rows x that no covariance has seen. Rounds no whole tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.llamacpp.library import ggml
from dynrun.rounding.feedback import Rounder
from dynrun.rounding.source import Rows, Source

# Fewer held-out rows than this say nothing: the middle of the strengths is taken.
_ENOUGH = 16


@dataclass(frozen=True)
class Choice:
    """``strength`` to round with, None for plain rounding; ``ratio``: the held-out output error over plain rounding's,
    1 for plain rounding."""

    strength: float | None
    ratio: float


PLAIN = Choice(None, 1.0)


def strength_of(source: Source, rounder: Rounder, name: str) -> float:
    """The best of the settings' strengths for the input of a tensor, found on that tensor in a type that is fast to
    round; the middle one where too little was held out."""
    settings, type_name = source.settings, _fast_type(source, name)
    experts = source.most_seen(name, settings.n_experts)
    ordered = sorted(settings.strengths)
    if len(ordered) == 1 or sum(len(source.held_out(name, expert)) for expert in experts) < _ENOUGH:
        return ordered[len(ordered) // 2]

    width = TENSOR_TYPES[type_name].block_size

    @cache
    def error(at: int) -> float:
        trials = (_Trial(source, rounder, name, expert, ordered[at], width) for expert in experts)
        return sum(trial.error(type_name, sweeps=0) for trial in trials)

    # Downhill from the second: each takes a decomposition of n³/3 products. Of demo's 120 inputs 110 get the best of
    # all so, the others one whose error is 0.5 to 5% larger.
    best = 1
    for step in (-1, 1):
        while 0 <= best + step < len(ordered) and error(best + step) < error(best):
            best += step
    return ordered[best]


def choose(source: Source, rounder: Rounder, name: str, types: Sequence[str], strength: float) -> list[Choice]:
    """What feedback of ``strength`` gives a tensor in each of ``types``; plain rounding where that is no worse."""
    experts = source.most_seen(name, source.settings.n_experts)
    plain, with_feedback = dict.fromkeys(types, 0.0), dict.fromkeys(types, 0.0)
    for expert in experts:
        # Types of one width share a factor.
        for width in sorted({TENSOR_TYPES[type_name].block_size for type_name in types}):
            its = [type_name for type_name in types if TENSOR_TYPES[type_name].block_size == width]
            trial = _Trial(source, rounder, name, expert, strength, width)
            for type_name in its:
                plain[type_name] += trial.plain_error(type_name)
                with_feedback[type_name] += trial.error(type_name, source.settings.sweeps)
    if not experts:
        return [Choice(strength, 1.0) for _ in types]
    return [
        Choice(strength, with_feedback[one] / plain[one]) if with_feedback[one] < plain[one] else PLAIN for one in types
    ]


def _fast_type(source: Source, name: str) -> str:
    return "Q3_K" if TENSOR_TYPES["Q3_K"].fits(source.weights.header.tensors[name].shape[0]) else "Q4_0"


class _Trial:
    """Some rows of an expert's matrix, rounded in types of one width; errors of the output on held-out inputs."""

    def __init__(self, source: Source, rounder: Rounder, name: str, expert: int, strength: float, width: int) -> None:
        self._rounder, self._rows = rounder, source.some(name, expert, source.settings.n_rows)
        self._factor = source.factor(name, expert, strength, width)
        self._importance, self._held_out = source.importance(name, expert), source.held_out(name, expert)

    def plain_error(self, type_name: str) -> float:
        library, type_id = ggml(), TENSOR_TYPES[type_name].ggml_id
        library.ggml_quantize_init(type_id)
        return output_error(self._held_out, self._rows - library.round_trip(type_id, self._rows, self._importance))

    def error(self, type_name: str, sweeps: int) -> float:
        """With feedback."""
        _, values = self._rounder.round(self._rows, self._factor, type_name, self._importance, sweeps=sweeps)
        return output_error(self._held_out, self._rows - values)


def output_error(x: Rows, error: Rows) -> float:
    """Σ (x·e)² over rows x [m, n] of the input and rows e [n_rows, n] of a weight's error."""
    return float(np.square(x @ error.T, dtype=np.float64).sum())
