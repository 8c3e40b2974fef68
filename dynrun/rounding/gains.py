"""What feedback takes off the error of every type on every tensor, from a few layers of each kind and a few types.

Takes an opened store, gives ratios that the allocator multiplies its errors by: held-out output errors with feedback
over those without. Layers in between are interpolated in the logarithm; a type has the ratio of its nearest relative.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dynrun.calibration.imatrix_stats import block_and_kind
from dynrun.rounding.store import Feedback

# Types of one construction, the first of each group that a tensor can have standing for all.
_FAMILIES = (
    ("IQ1_M", "IQ1_S"),
    ("IQ2_XS", "IQ2_XXS", "IQ2_S"),
    ("Q2_K", "Q2_0", "TQ1_0", "TQ2_0", "Q1_0"),
    ("IQ3_S", "IQ3_XXS"),
    ("Q3_K",),
    ("IQ4_XS", "IQ4_NL", "MXFP4", "NVFP4"),
    ("Q4_K", "Q4_0", "Q4_1"),
    ("Q5_K", "Q5_0", "Q5_1"),
    ("Q6_K", "Q8_0"),
)
_N_LAYERS = 4
Gains = Mapping[str, Mapping[str, float]]


def gains(
    feedback: Feedback, candidates: Mapping[str, Sequence[str]], on_tensor: Callable[[int, int], None]
) -> dict[str, dict[str, float]]:
    """tensor → type → ratio in (0, 1], for the types that each tensor in ``candidates`` can have."""
    kinds: dict[str, dict[int, str]] = defaultdict(dict)
    for name in candidates:
        block, kind = block_and_kind(name)
        kinds[kind][block or 0] = name
    sampled = {kind: _spread(sorted(layers)) for kind, layers in kinds.items()}
    found: dict[str, dict[str, float]] = {name: dict.fromkeys(types, 1.0) for name, types in candidates.items()}
    # In the order of the layers: tensors that share an input come one after another.
    measured: dict[str, dict[str, float]] = {}
    todo = sorted((layer, kind) for kind, layers in sampled.items() for layer in layers)
    for done, (at, kind) in enumerate(todo, start=1):
        name = kinds[kind][at]
        measured[name] = _of_types(feedback, name, candidates[name])
        on_tensor(done, len(todo))
    for kind, layers in kinds.items():
        for layer, name in layers.items():
            for type_name in found[name]:
                points = {at: measured[layers[at]].get(type_name, 1.0) for at in sampled[kind]}
                found[name][type_name] = _between(points, layer)
    return found


def _spread(layers: Sequence[int]) -> list[int]:
    """Up to four of them, the first and the last among them."""
    chosen = np.linspace(0, len(layers) - 1, min(_N_LAYERS, len(layers))).round().astype(int)
    return [layers[i] for i in chosen]


def _of_types(feedback: Feedback, name: str, types: Sequence[str]) -> dict[str, float]:
    mine = [[type_name for type_name in family if type_name in types] for family in _FAMILIES]
    families = [family for family in mine if family]
    found: dict[str, float] = {}
    for family, choice in zip(families, feedback.choices(name, [family[0] for family in families]), strict=True):
        found |= dict.fromkeys(family, choice.ratio)
    return found


def _between(points: Mapping[int, float], layer: int) -> float:
    layers = sorted(points)
    return float(np.exp(np.interp(layer, layers, [np.log(points[at]) for at in layers])))
