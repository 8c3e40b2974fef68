"""How the next token is drawn: what the user gave, what the model recommends, what llama.cpp does otherwise.

llama-server applies a model's recommendations (``general.sampling.*``) itself wherever a request says nothing
(common_init_sampler_from_model, common/common.cpp), so a request carries only what the user gave; :func:`in_force` is
for showing. Draws nothing itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dynrun.errors import UsageError

# Ours, llama-server's request, the model's metadata, llama.cpp's default (common/common.h).
_NAMES: dict[str, tuple[str, str, float]] = {
    "temperature": ("temperature", "general.sampling.temp", 0.8),
    "top_k": ("top_k", "general.sampling.top_k", 40),
    "top_p": ("top_p", "general.sampling.top_p", 0.95),
    "min_p": ("min_p", "general.sampling.min_p", 0.05),
    "repeat_penalty": ("repeat_penalty", "general.sampling.penalty_repeat", 1.0),
}
_MOST = {"top_p": 1.0, "min_p": 1.0}


@dataclass(frozen=True)
class Sampling:
    """None: not given. ``temperature`` 0 always takes the likeliest token; ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and
    ``repeat_penalty`` 1 switch these off. ``seed`` None is a random one, ``max_tokens`` None as many as fit.

    Raises UsageError for a number out of its range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (0 <= value <= _MOST.get(field.name, math.inf) and math.isfinite(value)):
                most = f"from 0 to {_MOST[field.name]:.0f}" if field.name in _MOST else "of 0 or more"
                name = f"--{field.name.replace('_', '-')}"
                raise UsageError(f"{name} is {value}", fix=f"give a number {most}")

    def request(self) -> dict[str, Any]:
        """The fields of a request to llama-server."""
        given = {name: getattr(self, ours) for ours, (name, _, _) in _NAMES.items() if getattr(self, ours) is not None}
        seed = {} if self.seed is None else {"seed": self.seed}
        return {**given, **seed, "max_tokens": -1 if self.max_tokens is None else self.max_tokens}


@dataclass(frozen=True)
class InForce:
    """A setting, and who says so: ``you``, ``model`` or ``llama.cpp``."""

    name: str
    value: float
    origin: str


def in_force(given: Sampling, metadata: Mapping[str, Any]) -> list[InForce]:
    """Every setting that a request of ``given`` will have, for the model with this ``metadata``."""
    found = []
    for name, (_, key, default) in _NAMES.items():
        value, recommended = getattr(given, name), metadata.get(key)
        if value is not None:
            found.append(InForce(name, value, "you"))
        elif isinstance(recommended, int | float) and math.isfinite(recommended):
            # A 32-bit float of the file: 0.6 is 0.6000000238.
            found.append(InForce(name, float(f"{recommended:.6g}"), "model"))
        else:
            found.append(InForce(name, default, "llama.cpp"))
    return found


def described(settings: list[InForce]) -> str:
    """One line for people; llama.cpp's own defaults are left out."""
    told = [
        f"{s.name} {s.value:g}{' (model)' if s.origin == 'model' else ''}" for s in settings if s.origin != "llama.cpp"
    ]
    return ", ".join(told) or "llama.cpp's defaults"
