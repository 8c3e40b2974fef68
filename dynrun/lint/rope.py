"""Context length against rope scaling, and the rope factors of Llama 3 and 4, which are a tensor of their own."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from dynrun.errors import DynrunError
from dynrun.lint.finding import Finding, Subject, number_of, shown

FACTORS = "rope_freqs.weight"
_TYPES = ("none", "linear", "yarn", "longrope", "su", "dynamic", "llama3", "mrope", "default")
# text_config.rope_scaling of meta-llama/Llama-4-Scout-17B-16E-Instruct, as corrected after its release; Maverick has
# none. Scout has 16 experts, Maverick 128.
_SCOUT = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
_SCOUT_EXPERTS = 16


def check_rope(subject: Subject) -> Iterator[Finding]:
    """Lengths, scaling, base; and the factors' values where tensors can be read."""
    length = subject.number("context_length")
    if length is None or length < 1:
        found = shown(subject.value("context_length") or "none")
        yield Finding("context-missing", "error", subject.key("context_length"), "tokens it was trained on", found)
    yield from _scaling(subject, length or 0)
    base = subject.number("rope.freq_base")
    if base is not None and base <= 0:
        yield Finding("rope-base", "error", subject.key("rope.freq_base"), "a positive number", shown(base))
    yield from _factors(subject)


def _scaling(subject: Subject, length: float) -> Iterator[Finding]:
    key = subject.key("rope.scaling.type")
    kind = subject.value("rope.scaling.type")
    if kind is not None and kind not in _TYPES:
        yield Finding("rope-type", "error", key, f"one of {', '.join(_TYPES[:4])}", shown(kind))
    factor = subject.number("rope.scaling.factor")
    if factor is not None and factor <= 0:
        yield Finding("rope-factor", "error", subject.key("rope.scaling.factor"), "a positive number", shown(factor))
        return
    original = subject.number("rope.scaling.original_context_length")
    if kind == "yarn":
        name = subject.key("rope.scaling.original_context_length")
        if original is None:
            expected = "the length before scaling: without it YaRN scales from context_length"
            yield Finding("rope-original", "warning", name, expected, "none")
        elif factor and length > original * factor * 1.01:
            expected = f"at most {original * factor:.0f}: {original:.0f} tokens by a factor of {factor:g}"
            yield Finding("context-beyond-rope", "warning", subject.key("context_length"), expected, f"{length:.0f}")
    if kind in ("yarn", "linear") and factor is None:
        yield Finding("rope-factor", "warning", subject.key("rope.scaling.factor"), f"a factor for {kind}", "none")


def _factors(subject: Subject) -> Iterator[Finding]:
    wanted = _wanted(subject)
    there = subject.header.tensors.get(FACTORS)
    if wanted is None:
        if there is not None and subject.architecture == "llama4" and _n_experts(subject) > _SCOUT_EXPERTS:
            yield Finding("llama4-rope", "error", FACTORS, "none: Llama 4 Maverick has no rope scaling", "rope factors")
        return
    name = "llama4-rope" if subject.architecture == "llama4" else "llama3-rope"
    expected = f"factors of llama3 scaling by {wanted['factor']:g}, from {wanted['original_max_position_embeddings']:g}"
    if there is None:
        yield Finding(name, "error", FACTORS, expected, "none: long contexts are not scaled")
        return
    if subject.read_tensor is None or there.type != "F32":
        return
    try:
        values = struct.unpack(f"<{there.n_elements}f", subject.read_tensor(FACTORS))
    except (struct.error, DynrunError) as error:
        yield Finding(name, "warning", FACTORS, expected, shown(f"it cannot be read: {error}"))
        return
    right = llama3_factors(wanted, subject.number("rope.freq_base") or 10000.0, 2 * len(values))
    off = [index for index, pair in enumerate(zip(values, right, strict=True)) if not math.isclose(*pair, rel_tol=1e-3)]
    if off:
        found = f"{len(off)} of {len(values)} differ, number {off[0]} is {values[off[0]]:g}, not {right[off[0]]:g}"
        yield Finding(name, "error", FACTORS, expected, found)


def _wanted(subject: Subject) -> Mapping[str, Any] | None:
    """The llama3 scaling that the model should have: as its config.json says, else as is known of Llama 4."""
    scaling = subject.config.get("rope_scaling") or subject.config.get("rope_parameters")
    if isinstance(scaling, dict) and subject.config:
        kind = scaling.get("rope_type") or scaling.get("type")
        complete = all(number_of(scaling.get(name)) for name in _SCOUT if name != "rope_type")
        return scaling if kind == "llama3" and complete else None
    return _SCOUT if subject.architecture == "llama4" and _n_experts(subject) == _SCOUT_EXPERTS else None


def _n_experts(subject: Subject) -> int:
    return subject.count("expert_count")


def llama3_factors(scaling: Mapping[str, Any], base: float, n_dims: int) -> list[float]:
    """What each rope frequency is divided by; as conversion/llama.py of llama.cpp computes it."""
    factor, original = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    factors = []
    for index in range(0, n_dims, 2):
        wavelength = 2 * math.pi * base ** (index / n_dims)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
