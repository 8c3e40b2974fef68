"""What `dynrun bench` runs: a model in each of the placements that were asked for, as options of llama-bench.

Takes names of placements, gives setups. ``auto`` is what `run` would choose; ``cpu`` all in RAM; ``gpu`` all on
devices; ``moe`` the experts in RAM and all else on devices; ``ngl=N`` and ``ncmoe=N`` as llama.cpp counts them, also
together: ``ngl=99+ncmoe=8``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dynrun.errors import UsageError
from dynrun.runtime.bench import Setup
from dynrun.runtime.placement import Placement

_ALL_LAYERS = 999
_NAMED = {
    "cpu": ("-ngl", "0"),
    "gpu": ("-ngl", str(_ALL_LAYERS)),
    "moe": ("-ngl", str(_ALL_LAYERS), "-ncmoe", str(_ALL_LAYERS)),
}
_NUMBERED = re.compile(r"(ngl|ncmoe)=(\d+)")
# llama-server's options that llama-bench spells alike, with their values.
_SHARED = ("-ngl", "-ctk", "-ctv", "-dev", "-ts", "-lm", "-fa", "-sm", "-mg")


def parse_placements(text: str) -> tuple[str, ...]:
    """Names, separated by commas. Raises UsageError for one that there is not."""
    names = tuple(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    for name in names:
        if name != "auto":
            _named(name)
    if not names:
        raise UsageError("no placement is given", fix="as in auto,cpu,ngl=20,ngl=99+ncmoe=8")
    return names


def _named(name: str) -> tuple[str, ...]:
    if name in _NAMED:
        return _NAMED[name]
    options: list[str] = []
    for part in name.split("+"):
        match = _NUMBERED.fullmatch(part)
        if match is None:
            raise UsageError(f"{name!r} is no placement", fix="auto, cpu, gpu, moe, ngl=N, ncmoe=N, or ngl=N+ncmoe=N")
        options += [f"-{match[1]}", match[2]]
    return tuple(options)


def bench_options(placement: Placement) -> tuple[str, ...]:
    """A placement of llama-server as llama-bench takes it: several overrides and devices are joined otherwise there."""
    given = dict(zip(placement.argv, placement.argv[1:], strict=False))
    options = [part for key in _SHARED if key in given for part in (key, _value(key, given[key]))]
    if placement.overrides:
        options += ["-ot", ";".join(f"{pattern}={buffer}" for pattern, buffer in placement.overrides)]
    return tuple(options)


def _value(key: str, value: str) -> str:
    return value.replace(",", "/") if key in ("-dev", "-ts") else value


def setups(
    name: str,
    model: Path,
    placements: Sequence[str],
    planned: Placement,
    *,
    bytes_per_s: float,
    rpc: Sequence[str] = (),
) -> list[Setup]:
    """A setup for each placement; ``planned`` is ``auto``. The share of the bandwidth limit is told where all weights
    are in one memory, of ``bytes_per_s``."""
    remote = ("-rpc", ",".join(rpc)) if rpc else ()
    made = []
    for placement in placements:
        options = bench_options(planned) if placement == "auto" else _named(placement)
        in_ram = placement == "cpu" or (placement == "auto" and planned.verdict == "ram")
        made.append(
            Setup(
                name=name,
                model=model,
                placement=placement,
                options=(*remote, *options),
                bytes_per_token=planned.bytes_per_token if in_ram else 0.0,
                bytes_per_s=bytes_per_s if in_ram else 0.0,
                planned=planned if placement == "auto" else None,
            )
        )
    return made
