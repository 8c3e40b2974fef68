"""What running models here has taught about predictions: measured over predicted speed, by kind of placement.

Takes measurements as they happen, gives factors; the file is a JSON line each. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from dynrun.artifacts import append_line, read_lines, translated_os_errors
from dynrun.paths import cache_dir
from dynrun.runtime.machine import Machine
from dynrun.runtime.model_facts import ModelFacts
from dynrun.runtime.placement import Placement
from dynrun.runtime.residence import residence
from dynrun.runtime.speed import kinds_of, raw_speed

# Old measurements are of old builds and drivers.
_NEWEST = 9
# A measurement so far off is of a machine that did something else.
_LEAST, _MOST = 0.02, 20.0


def note_speed(facts: ModelFacts, machine: Machine, placement: Placement, tokens_per_second: float) -> None:
    """Keep a measured speed of text generation. Raises DynrunError where the cache cannot be written."""
    predicted = raw_speed(facts, placement.choice, machine)
    if not predicted or not math.isfinite(tokens_per_second) or tokens_per_second <= 0:
        return
    path, where = _path(), residence(facts, placement.choice)
    with translated_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for kind in kinds_of(facts, where):
            append_line(path, [machine_key(machine), kind, tokens_per_second / predicted])


def calibration_of(machine: Machine) -> dict[str, float]:
    """The median factor of the newest measurements of each kind on ``machine``."""
    key, found = machine_key(machine), dict[str, list[float]]()
    for measured, kind, factor in read_lines(_path(), _parsed, mend=False):
        if measured == key:
            found.setdefault(kind, []).append(factor)
    return {kind: median(factors[-_NEWEST:]) for kind, factors in found.items()}


def machine_key(machine: Machine) -> str:
    """The same for the same hardware, whatever is free of its memory."""
    devices = ",".join(f"{device.description}:{device.total_bytes >> 28}" for device in machine.devices)
    return f"{machine.name}/{machine.cores}/{machine.ram_bytes >> 28}/{devices}"


def _path() -> Path:
    return cache_dir() / "speeds.jsonl"


def _parsed(line: Any) -> tuple[str, str, float]:
    machine, kind, factor = _three(line)
    if not isinstance(machine, str) or not isinstance(kind, str) or not _LEAST <= float(factor) <= _MOST:
        raise ValueError(line)
    return machine, kind, float(factor)


def _three(line: Iterable[Any]) -> tuple[Any, Any, Any]:
    first, second, third = line
    return first, second, third
