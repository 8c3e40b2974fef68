"""What a user wants of certain tensors, and of the speed: which types each tensor may have.

Takes rules (``regex=TYPE``), gives the types that are left; chooses none of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, get_args

from dynrun.allocation.speed import SpeedTable, kind_of
from dynrun.errors import UsageError
from dynrun.gguf.header import TensorInfo
from dynrun.gguf.tensor_types import DEFAULT_MENU, TENSOR_TYPES, WEIGHT_TYPES, known_type

Kind = Literal["pin", "min", "max"]


@dataclass(frozen=True)
class Rule:
    """Tensors whose name ``pattern`` is found in (``re.search``) have ``type`` (pin), or no fewer (min) or no more
    (max) bits per weight than it has."""

    kind: Kind
    pattern: str
    type: str

    def __str__(self) -> str:
        return f"--{self.kind} '{self.pattern}={self.type}'"

    def matches(self, tensor: str) -> bool:
        return re.search(self.pattern, tensor) is not None

    def admits(self, type_name: str) -> bool:
        if self.kind == "pin":
            return type_name == self.type
        over = TENSOR_TYPES[type_name].bpw - TENSOR_TYPES[self.type].bpw
        return over >= 0 if self.kind == "min" else over <= 0


@dataclass(frozen=True)
class Constraints:
    """``min_speed``: the predicted tokens per second over those of the stock preset, by the times in ``speed``.

    Raises UsageError where one of the two is given without the other, or ``min_speed`` is not positive.
    """

    rules: tuple[Rule, ...] = ()
    speed: SpeedTable | None = None
    min_speed: float | None = None

    def __post_init__(self) -> None:
        if self.speed is None and self.min_speed is not None:
            raise UsageError("--min-speed needs the times of the types", fix="give --speed-table FILE")
        if self.speed is not None and self.min_speed is None:
            raise UsageError("--speed-table alone asks for nothing", fix="give --min-speed R too, as 0.9")
        # Not <= 0: a nan fails it too.
        if self.min_speed is not None and not 0 < self.min_speed < float("inf"):
            raise UsageError(f"--min-speed is {self.min_speed}", fix="give a positive ratio, as 0.9")


NO_CONSTRAINTS = Constraints()


def parse_rule(kind: Kind, text: str) -> Rule:
    """``regex=TYPE``, split at the last ``=``. Raises UsageError for no type, an unknown one or an invalid regex."""
    assert kind in get_args(Kind)
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"--{kind} {text!r} is no rule", fix=f"write it as --{kind} 'attn_v=Q6_K'")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"--{kind} {text!r}: {pattern!r} is no regular expression: {error}", fix="put \\ before . ( [ * + ?"
        ) from error
    return Rule(kind, pattern, known_type(name, f"--{kind} {text!r}"))


def check_patterns(rules: Iterable[Rule], tensors: Collection[str]) -> None:
    """Raise UsageError for a rule that matches none of ``tensors`` (the quantizable ones of the model)."""
    for rule in rules:
        if not any(rule.matches(name) for name in tensors):
            kinds = sorted({kind_of(name) for name in tensors})
            near = get_close_matches(kind_of(rule.pattern), [*kinds, *sorted(tensors)], n=1, cutoff=0.0)
            hint = f"the nearest is {near[0]!r}; kinds: {', '.join(kinds)}" if near else "leave it out"
            raise UsageError(f"{rule} matches no tensor that is quantized", fix=hint)


def allowed(
    tensor: TensorInfo, types: Sequence[str], constraints: Constraints, *, possible: Collection[str] | None = None
) -> list[str]:
    """Which of ``types`` (the menu's candidates) the rules leave for ``tensor``; the pinned one, in the menu or not.

    ``possible``: all types that the tensor can be given (default: those whose blocks its rows fill). Raises UsageError,
    naming the nearest possible wish, where a pinned type is not among them, where rules contradict each other, or where
    they leave nothing of the menu.
    """
    rules = [rule for rule in constraints.rules if rule.matches(tensor.name)]
    if possible is None:
        possible = [name for name in WEIGHT_TYPES if TENSOR_TYPES[name].fits(tensor.shape[0])]
    pins = [rule for rule in rules if rule.kind == "pin"]
    if pins and pins[0].type not in possible:
        raise UsageError(
            f"{pins[0]}: {tensor.name} cannot be {pins[0].type}: {_why(tensor, pins[0].type)}",
            fix=f"the nearest possible is {_advice(pins[0].type, possible)}",
        )
    _check_agreement(tensor.name, rules, possible)
    left = [name for name in ([pins[0].type] if pins else types) if all(rule.admits(name) for rule in rules)]
    if not left:
        within = _advice(rules[0].type, [name for name in possible if all(rule.admits(name) for rule in rules)])
        raise UsageError(
            f"{' and '.join(map(str, rules))} leave {tensor.name} none of the types {', '.join(types)}",
            fix=f"add {within} to --types, or ask for {_advice(rules[0].type, types)}",
        )
    return left


def _check_agreement(tensor: str, rules: Sequence[Rule], possible: Collection[str]) -> None:
    """Raise UsageError for the first two rules that no possible type meets together."""
    for i, first in enumerate(rules):
        for second in rules[i + 1 :]:
            if not any(first.admits(name) and second.admits(name) for name in possible):
                raise UsageError(
                    f"{first} and {second} contradict each other for {tensor}",
                    fix=f"keep one of them, or write {second.type} as {_advice(first.type, possible)}",
                )
    for rule in rules:
        if not any(rule.admits(name) for name in possible):
            near = _advice(rule.type, possible)
            raise UsageError(f"{rule}: {tensor} can have no such type", fix=f"the nearest possible is {near}")


def _why(tensor: TensorInfo, type_name: str) -> str:
    """Why ``tensor`` cannot be given the type."""
    kind = TENSOR_TYPES[type_name]
    if not kind.fits(tensor.shape[0]):
        return f"its rows of {tensor.shape[0]} are no multiple of {kind.block_size}"
    return "it has no imatrix entry" if kind.needs_imatrix else "a block that no measurement reaches needs more bits"


def _advice(type_name: str, types: Collection[str]) -> str:
    """The nearest type to ask for instead: one that every engine loads, if there is any."""
    return nearest_type(type_name, [name for name in types if name in DEFAULT_MENU] or types)


def nearest_type(type_name: str, types: Collection[str]) -> str:
    """The one of ``types`` nearest in bits per weight, the finer of two as near."""
    bpw = TENSOR_TYPES[type_name].bpw
    return min(types, key=lambda name: (abs(TENSOR_TYPES[name].bpw - bpw), -TENSOR_TYPES[name].bpw, name))
