"""What two schemes, or GGUFs, differ in: tensors by kind and layers, bits per weight, bytes, predicted KLD.

Takes two opened schemes; measures nothing and prints nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dynrun.errors import UsageError
from dynrun.gguf.header import TensorInfo
from dynrun.scheme import Scheme, expanded
from dynrun.scheme_gguf import Opened, bpw, nbytes
from dynrun.scheme_types import block_of, coarseness, ranges


@dataclass(frozen=True)
class Change:
    """Tensors that differ alike: ``layers`` of a ``kind`` as "0-3, 5", empty outside of blocks.

    ``before`` and ``after`` are types, None where the tensor is not in that scheme.
    """

    kind: str
    layers: str
    n_tensors: int
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Side:
    """One of the two: ``nbytes`` and ``bpw`` of all tensors that its scheme names, None where shapes are unknown."""

    opened: Opened
    scheme: Scheme
    nbytes: int | None
    bpw: float | None


@dataclass(frozen=True)
class Difference:
    """``types``: of each tensor that differs the type in either, None where it is missing."""

    a: Side
    b: Side
    types: Mapping[str, tuple[str | None, str | None]]
    n_same: int

    @property
    def only(self) -> Mapping[Literal["a", "b"], list[str]]:
        """The tensors that are in one only."""
        missing = {"a": 1, "b": 0}
        return {key: [n for n, pair in self.types.items() if pair[missing[key]] is None] for key in ("a", "b")}

    def changes(self) -> list[Change]:
        """The tensors that are in both and differ, grouped; outside of blocks first."""
        return group({name: pair for name, pair in self.types.items() if None not in pair})


def compare(a: Opened, b: Opened, model: Mapping[str, TensorInfo] | None = None) -> Difference:
    """What ``a`` and ``b`` differ in.

    Shapes are those of ``model``, else of either GGUF. Rules of a scheme are applied to ``model``'s tensors, else to
    the other's. Raises UsageError where rules name what nobody lists.
    """
    shapes = model if model is not None else {**b.shapes, **a.shapes}
    names = set(model or ()) or {*a.scheme.types, *b.scheme.types}
    if a.scheme.rules and b.scheme.rules and not model:
        raise UsageError(
            f"{a.path} and {b.path} both have rules for tensors that neither lists", fix="name the model with --model"
        )
    before, after = _side(a, sorted(names), shapes), _side(b, sorted(names), shapes)
    left, right = before.scheme.types, after.scheme.types
    pairs = {name: (left.get(name), right.get(name)) for name in sorted({*left, *right}, key=_place)}
    different = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return Difference(before, after, different, len(pairs) - len(different))


def group(types: Mapping[str, tuple[str | None, str | None]]) -> list[Change]:
    """Tensors of one kind and one pair of types as one change."""
    layers: defaultdict[tuple[str, str | None, str | None], list[int | None]] = defaultdict(list)
    for name, pair in types.items():
        layer, kind = block_of(name)
        layers[kind, *pair].append(layer)

    def place(key: tuple[str, str | None, str | None]) -> tuple[object, ...]:
        return None not in layers[key], key[0], *((coarseness(t) if t else (0.0, "")) for t in key[1:])

    changes = []
    for key in sorted(layers, key=place):
        numbers = [layer for layer in layers[key] if layer is not None]
        changes.append(Change(key[0], ranges(numbers), len(layers[key]), *key[1:]))
    return changes


def _side(opened: Opened, names: list[str], shapes: Mapping[str, TensorInfo]) -> Side:
    scheme = expanded(opened.scheme, names)
    return Side(opened, scheme, nbytes(scheme.types, shapes), bpw(scheme.types, shapes))


def _place(name: str) -> tuple[int, str]:
    layer, kind = block_of(name)
    return (-1 if layer is None else layer), kind
