"""What is probed together, and in which types: every tensor alone, or groups of one kind in neighbouring layers.

A group is measured with all its tensors replaced at once; each is given its part of the KLD by its part of the error.
A tensor whose inputs are far from its group's stays alone: where massive activations (arXiv 2402.17762) hold nearly all
of Σ h·w², every error is small beside them, and says nothing of what its neighbours' errors cost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

from dynrun.errors import UsageError
from dynrun.gguf.tensor_types import TENSOR_TYPES

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
# `kind:depth` cuts the layers in so many parts.
_PARTS = 8
# Bits per weight to probe at: around 3.4, where most of the difference is made, then finer, then where KLD bends.
_BITS = (3.4375, 5.5, 2.5625)
# Times the energy that most of a group have.
_ALIKE = 8.0


@dataclass(frozen=True)
class Unit:
    """Tensors that are replaced together; ``types``: what they are measured at, coarse first."""

    name: str
    types: tuple[dict[str, str], ...]


def probe_types(candidates: Sequence[str]) -> tuple[str, ...]:
    """The types that a tensor is measured in, the coarse one first, then a finer and a coarser one if there are such
    among its ``candidates``. Empty where it can be of full precision only."""
    types = [name for name in candidates if TENSOR_TYPES[name].bpw < 16]

    def nearest(bits: float) -> str:
        # Of equal size the types that schemes take more often: wide blocks, then codebooks.
        def rank(name: str) -> tuple[float, int, bool, str]:
            found = TENSOR_TYPES[name]
            return abs(math.log(found.bpw / bits)), -found.block_size, not name.startswith("IQ"), name

        return min(types, key=rank)

    return tuple(dict.fromkeys(nearest(bits) for bits in _BITS)) if types else ()


def units(candidates: Mapping[str, Sequence[str]], group: str, energy: Mapping[str, float]) -> list[Unit]:
    """The units of tensors with their ``candidates``. ``group``: empty, ``kind``, ``kind:N`` (N neighbouring layers),
    or ``kind:depth`` (an eighth of the layers); ``energy``: Σ h·w² of each. Raises UsageError for another group."""
    types = {name: probe_types(own) for name, own in candidates.items()}
    names = [name for name, own in types.items() if own]
    grouped = _alike(_grouped(names, group), energy)
    return [_unit(name, {n: types[n] for n in members}) for name, members in grouped.items()]


def _alike(grouped: Mapping[str, Sequence[str]], energy: Mapping[str, float]) -> dict[str, list[str]]:
    """The groups without those tensors whose energy is far above or below what is usual in theirs."""
    found: dict[str, list[str]] = {}
    for group, names in grouped.items():
        usual = median_low(energy[name] for name in names)
        if together := [n for n in names if usual <= energy[n] * _ALIKE and energy[n] <= usual * _ALIKE]:
            found[group] = together
        found |= {name: [name] for name in names if name not in together}
    return found


def check_group(group: str) -> str:
    """``group`` itself. Raises UsageError where :func:`units` would."""
    _layers_each(group, 1)
    return group


def _layers_each(group: str, n_layers: int) -> int:
    """Neighbouring layers in a group; 0: each tensor alone."""
    match = re.fullmatch(r"(?:kind(?::(depth|[1-9][0-9]*))?)?", group)
    if match is None:
        raise UsageError(f"no probe group {group!r}", fix="one of kind, kind:depth, or kind:4 for four layers a group")
    if not group:
        return 0
    if match[1] is None:
        return max(1, n_layers)
    return -(-n_layers // _PARTS) if match[1] == "depth" else int(match[1])


def _grouped(names: Iterable[str], group: str) -> dict[str, list[str]]:
    names = list(names)
    matches = {name: _BLOCK.fullmatch(name) for name in names}
    each = _layers_each(group, 1 + max((int(m[1]) for m in matches.values() if m), default=0))
    found: dict[str, list[str]] = {}
    for name, match in matches.items():
        if match is None or not each:
            found[name] = [name]
            continue
        first = int(match[1]) // each * each
        found.setdefault(f"blk.{first}-{first + each - 1}.{match[2]}", []).append(name)
    return found


def _unit(name: str, types: Mapping[str, tuple[str, ...]]) -> Unit:
    # A tensor with fewer levels than others of its group is measured at its last one again.
    levels = range(max(len(own) for own in types.values()))
    return Unit(name, tuple({n: own[min(level, len(own) - 1)] for n, own in types.items()} for level in levels))
