"""How strongly a tensor's covariance is to be trusted, and what feedback then gives, by held-out activations.

Takes a tensor and a type, rounds some of its rows with and without feedback, and compares the errors of the layer's
output, Σ (x·(w−q))², on rows x that no covariance has seen. Rounds no whole tensor.
"""

from __future__ import annotations

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

    @cache
    def error(at: int) -> float:
        strength = ordered[at]
        return sum(_error(source, rounder, name, expert, type_name, strength, sweeps=0) for expert in experts)

    # Downhill from the second: each takes a decomposition of n³/3 products. Of demo's 120 inputs 110 get the best of
    # all so, the others one whose error is 0.5 to 5% larger.
    best = 1
    for step in (-1, 1):
        while 0 <= best + step < len(ordered) and error(best + step) < error(best):
            best += step
    return ordered[best]


def choose(source: Source, rounder: Rounder, name: str, type_name: str, strength: float) -> Choice:
    """What feedback of ``strength`` gives a tensor in a type; plain rounding where that is no worse."""
    plain = with_feedback = 0.0
    for expert in (experts := source.most_seen(name, source.settings.n_experts)):
        plain += _plain_error(source, name, expert, type_name)
        with_feedback += _error(source, rounder, name, expert, type_name, strength, sweeps=source.settings.sweeps)
    if not experts:
        return Choice(strength, 1.0)
    return Choice(strength, with_feedback / plain) if with_feedback < plain else PLAIN


def _fast_type(source: Source, name: str) -> str:
    return "Q3_K" if TENSOR_TYPES["Q3_K"].fits(source.weights.header.tensors[name].shape[0]) else "Q4_0"


def _error(
    source: Source, rounder: Rounder, name: str, expert: int, type_name: str, strength: float, *, sweeps: int
) -> float:
    rows = source.some(name, expert, source.settings.n_rows)
    factor = source.factor(name, expert, strength, TENSOR_TYPES[type_name].block_size)
    _, values = rounder.round(rows, factor, type_name, source.importance(name, expert), sweeps=sweeps)
    return output_error(source.held_out(name, expert), rows - values)


def _plain_error(source: Source, name: str, expert: int, type_name: str) -> float:
    rows = source.some(name, expert, source.settings.n_rows)
    library, type_id, importance = ggml(), TENSOR_TYPES[type_name].ggml_id, source.importance(name, expert)
    library.ggml_quantize_init(type_id)
    return output_error(source.held_out(name, expert), rows - library.round_trip(type_id, rows, importance))


def output_error(x: Rows, error: Rows) -> float:
    """Σ (x·e)² over rows x [m, n] of the input and rows e [n_rows, n] of a weight's error."""
    return float(np.square(x @ error.T, dtype=np.float64).sum())
