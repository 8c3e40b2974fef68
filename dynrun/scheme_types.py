"""The tables [types] and [slopes] of a scheme's file: which tensor has which type, and what was measured of it.

Takes mappings from tensor names and gives lines of TOML that a person can review; takes TOML's tables and gives the
mappings back, strictly: whatever is unknown, missing or said twice is an error that names the place. Knows names only;
whether a type fits a tensor's shape is not its business.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from dynrun.errors import UsageError
from dynrun.gguf.tensor_types import TENSOR_TYPES, WEIGHT_TYPES

# Layers have at most four digits, so that a slip of the finger names no million of them.
_LAYER = "(0|[1-9][0-9]{0,3})"
_BLOCK = re.compile(rf"blk\.{_LAYER}\.(.+)", re.DOTALL)
_KIND = re.compile(r"blk\.\*\.(.+)", re.DOTALL)
_RANGE = re.compile(rf"{_LAYER}(?:-{_LAYER})?")
# The order in which a block computes; what is not here comes after, by name.
_KINDS = (
    *("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "attn_k_b"),
    *("attn_v_b", "attn_gate", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    *("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps", "ffn_down_exps"),
    *("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"),
)
# The type of every tensor that nothing else names. No tensor has this name: those of weights end with ``weight``.
DEFAULT = "default"
Slopes = Mapping[str, tuple[tuple[float, float], ...]]


def toml(value: str | int | float) -> str:
    """A TOML value. JSON's escapes are TOML's, but for DEL; a name out of a broken file system may hold surrogates."""
    if isinstance(value, float):
        return repr(float(value))
    if isinstance(value, int):
        return str(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f").encode("utf-8", "replace").decode()


def block_of(name: str) -> tuple[int | None, str]:
    """Layer and kind of a tensor: ``(3, "attn_q.weight")``; outside of the blocks ``(None, name)``."""
    match = _BLOCK.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)


def kind_order(kind: str) -> tuple[int, str]:
    """Sorts kinds of a block's tensors, with ``.weight`` or without, as the block computes; unknown ones last."""
    name = kind.removesuffix(".weight")
    return (_KINDS.index(name) if name in _KINDS else len(_KINDS)), kind


def coarseness(type_name: str) -> tuple[float, str]:
    """Sorts types by bits per weight."""
    return TENSOR_TYPES[type_name].bpw, type_name


def ranges(layers: Iterable[int]) -> str:
    """Layers as "0-3, 5"."""
    runs: list[tuple[int, int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], layer
        else:
            runs.append((layer, layer))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def expand(types: Mapping[str, str], rules: Mapping[str, str], tensors: Iterable[str]) -> dict[str, str]:
    """``types``, and those of ``tensors`` that only a rule gives a type: that of its kind, else the default."""
    whole = dict(types)
    for tensor in tensors:
        layer, kind = block_of(tensor)
        rule = None if layer is None else rules.get(f"blk.*.{kind}")
        if tensor not in whole and (type_name := rule or rules.get(DEFAULT)):
            whole[tensor] = type_name
    return whole


# -- writing -----------------------------------------------------------------------------------------------------------


def render_types(types: Mapping[str, str], rules: Mapping[str, str]) -> list[str]:
    """The lines of [types]: the same ones for equal mappings."""
    lines = ["[types]"] + ([f"# {_mixture(types)}"] if types else [])
    lines += [f"{DEFAULT} = {toml(rules[DEFAULT])}"] if DEFAULT in rules else []
    lines += [f"{toml(kind)} = {toml(rules[kind])}" for kind in sorted(rules) if kind != DEFAULT]
    kinds: defaultdict[str, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for name, type_name in sorted(types.items()):
        layer, kind = block_of(name)
        if layer is None or f"blk.*.{kind}" in rules:
            # TOML has no table where there is a line of the same name.
            lines.append(f"{toml(name)} = {toml(type_name)}")
        else:
            kinds[kind][type_name].append(layer)
    for kind, layers in sorted(kinds.items()):
        lines += ["", f"[types.{toml(f'blk.*.{kind}')}]"]
        lines += [f"{name} = {toml(ranges(layers[name]))}" for name in sorted(layers, key=coarseness)]
    return lines


def render_slopes(slopes: Slopes) -> list[str]:
    """The lines of [slopes], a tensor each, numbers with six significant digits."""

    def place(name: str) -> tuple[int, str]:
        layer, kind = block_of(name)
        return (-1 if layer is None else layer), kind

    lines = ["[slopes]", "# Measured: weighted error and KLD (nats per token) of each probe."]
    for name in sorted(slopes, key=place):
        points = ", ".join(f"[{float(error):.6g}, {float(kld):.6g}]" for error, kld in slopes[name])
        lines.append(f"{toml(name)} = [{points}]")
    return lines


def _mixture(types: Mapping[str, str]) -> str:
    counts = Counter(types.values())
    parts = [f"{counts[name]} {name} ({TENSOR_TYPES[name].bpw:.4g})" for name in sorted(counts, key=coarseness)]
    return f"Tensors of each type (bits per weight): {', '.join(parts)}"


# -- reading -----------------------------------------------------------------------------------------------------------


def nearest(word: str, known: Collection[str]) -> str:
    """``fix`` of an error about ``word``, letter case aside."""
    folded = {name.lower(): name for name in sorted(known)}
    near = get_close_matches(word.lower(), folded, n=1, cutoff=0.0)
    return f"the nearest valid one is {folded[near[0]]!r}" if near else "remove it"


def check_type(value: object, wanted: type, place: str) -> None:
    """Raise UsageError where ``value`` is of another type than TOML has for ``wanted``."""
    # A bool is an int to Python, and a whole number is a fine float to a person.
    fits = type(value) is wanted or (wanted is float and type(value) is int)
    if not fits:
        names = {str: "a string", int: "an integer", float: "a number", dict: "a table", list: "a list"}
        raise UsageError(f"{place} is {value!r:.60}", fix=f"it must be {names[wanted]}")


def read_types(table: object, where: str, tensors: Collection[str] | None) -> tuple[dict[str, str], dict[str, str]]:
    """Types of tensors, and rules that could not be expanded as the names of the ``tensors`` are not known.

    Raises UsageError as :func:`dynrun.scheme.parse` says.
    """
    reader = _Types(where, tensors)
    reader.read(table)
    return reader.complete()


def read_slopes(
    table: object, where: str, tensors: Collection[str] | None
) -> dict[str, tuple[tuple[float, float], ...]]:
    """Points (weighted error, KLD) of tensors. Raises UsageError as :func:`dynrun.scheme.parse` says."""
    place = f"{where}, [slopes]"
    check_type(table, dict, place)
    assert isinstance(table, dict)
    for name in table:
        if tensors is not None and name not in tensors:
            raise _unknown_tensor(f"{place} {toml(name)}", name, tensors)
    return {name: _points(points, f"{place} {toml(name)}") for name, points in table.items()}


def _points(points: object, place: str) -> tuple[tuple[float, float], ...]:
    fix = "write points as [[error, KLD], [error, KLD]]"
    if not isinstance(points, list) or not points:
        raise UsageError(f"{place} is {points!r:.60}", fix=fix)
    for point in points:
        numbers = isinstance(point, list) and [type(value) for value in point if type(value) in (int, float)]
        # A KLD of nothing at all may be measured as a little less.
        if not numbers or len(numbers) != 2 or len(point) != 2 or not all(map(finite, point)) or point[0] < 0:
            raise UsageError(f"{place} has the point {point!r:.60}", fix=f"{fix}, finite numbers, errors not negative")
    return tuple((float(error), float(kld)) for error, kld in points)


def finite(number: float) -> bool:
    """Whether a float can hold ``number``, which may be an integer of any length."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _layers(text: str, place: str) -> list[int]:
    """The inverse of :func:`ranges`, in any order."""
    layers: list[int] = []
    for item in text.split(","):
        match = _RANGE.fullmatch(item.strip())
        first = int(match[1]) if match else 0
        last = int(match[2]) if match and match[2] else first
        if match is None or (match[2] and last <= first):
            raise UsageError(f"{place}: {item.strip()!r} is no layer and no range", fix='write layers as "0-3, 5"')
        layers += range(first, last + 1)
    return layers


def _unknown_tensor(place: str, name: str, tensors: Collection[str]) -> UsageError:
    layer, kind = block_of(name)
    known: Collection[str] = tensors
    if layer is not None:
        layers = [n for n, other in map(block_of, tensors) if n is not None and other == kind]
        if layers:
            known = [f"blk.{min(layers, key=lambda n: (abs(n - layer), n))}.{kind}"]
    elif _KIND.fullmatch(name):
        known = _kinds(tensors)
    return UsageError(f"{place}: the model has no quantizable tensor {name!r}", fix=nearest(name, known))


def _kinds(tensors: Iterable[str]) -> set[str]:
    return {f"blk.*.{kind}" for layer, kind in map(block_of, tensors) if layer is not None}


class _Types:
    """Collects tensor → type from the [types] table and refuses what cannot be meant."""

    def __init__(self, where: str, tensors: Collection[str] | None) -> None:
        self.where = where
        self.tensors = None if tensors is None else frozenset(tensors)
        self.types: dict[str, str] = {}
        self.rules: dict[str, str] = {}
        self.places: dict[str, str] = {}

    def read(self, table: object) -> None:
        place = f"{self.where}, [types]"
        check_type(table, dict, place)
        assert isinstance(table, dict)
        for key, value in table.items():
            if isinstance(value, dict):
                self._read_kind(key, value)
                continue
            line = f"{place} {toml(key)}"
            check_type(value, str, line)
            if key == DEFAULT or _KIND.fullmatch(key):
                self._add_rule(key, value, line)
            else:
                self._add(key, value, line)

    def _read_kind(self, key: str, table: Mapping[str, Any]) -> None:
        place = f"{self.where}, [types.{toml(key)}]"
        kind = _KIND.fullmatch(key)
        if kind is None:
            raise UsageError(
                f'{place}: tables are for tensors of blocks, as [types."blk.*.attn_q.weight"]',
                fix='write another tensor on a line of [types], quoted: "token_embd.weight" = "Q4_K"',
            )
        if not table:
            raise UsageError(f"{place} is empty", fix="give its types and layers, or remove it")
        for type_name, layers in table.items():
            line = f"{place} {type_name}"
            self._check_type_name(type_name, line)
            check_type(layers, str, line)
            for layer in _layers(layers, line):
                self._add(f"blk.{layer}.{kind[1]}", type_name, line)

    def _check_type_name(self, type_name: str, place: str) -> None:
        if type_name not in WEIGHT_TYPES:
            raise UsageError(f"{place}: unknown tensor type {type_name!r}", fix=nearest(type_name, WEIGHT_TYPES))

    def _add_rule(self, key: str, type_name: str, place: str) -> None:
        self._check_type_name(type_name, place)
        if self.tensors is not None and key != DEFAULT and key not in _kinds(self.tensors):
            raise _unknown_tensor(place, key, self.tensors)
        self.rules[key] = type_name

    def _add(self, tensor: str, type_name: str, place: str) -> None:
        self._check_type_name(type_name, place)
        if self.tensors is not None and tensor not in self.tensors:
            raise _unknown_tensor(place, tensor, self.tensors)
        if tensor in self.types:
            other = self.places[tensor].removeprefix(f"{self.where}, ")
            raise UsageError(f"{place}: {tensor!r} is named twice", fix=f"it is in {other} already; keep one")
        self.types[tensor], self.places[tensor] = type_name, place

    def complete(self) -> tuple[dict[str, str], dict[str, str]]:
        """All that was read. Raises UsageError where a tensor of the model is missing."""
        if self.tensors is None:
            return self.types, self.rules
        types = expand(self.types, self.rules, sorted(self.tensors))
        if missing := self.tensors - set(types):
            more = f" and {len(missing) - 1} more have" if len(missing) > 1 else " has"
            raise UsageError(
                f"{self.where}, [types]: {min(missing)!r}{more} no type",
                fix='add it, or a line default = "Q4_K", or make the scheme for this model',
            )
        return types, {}
