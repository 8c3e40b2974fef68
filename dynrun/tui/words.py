"""Numbers as the app writes them: sizes, rates, durations, ages, contexts."""

from __future__ import annotations

from pathlib import PurePath

_DAY_S = 86400.0
_AGES = ((60.0, "s"), (3600.0, "min"), (_DAY_S, "h"), (30 * _DAY_S, "d"), (365 * _DAY_S, "mo"))
_UNIT_S = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": _DAY_S, "mo": 30 * _DAY_S}


def size(n: float) -> str:
    """Bytes: ``436 MB``, ``12.5 GB``; decimal, as the commands write them."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= factor:
            value = n / factor
            return f"{value:.1f} {unit}" if value < 100 else f"{value:,.0f} {unit}"
    return f"{n:.0f} B"


def gib(n: float) -> str:
    """Bytes of memory: ``5.2 GiB``, ``310 MiB``; binary, as memory is sold."""
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """``42 s``, ``3:05``, ``1:02:03``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def age(seconds: float) -> str:
    """How long ago: ``now``, ``5 min``, ``3 d``."""
    if seconds < 60:
        return "now"
    unit = next((unit for limit, unit in _AGES if seconds < limit), "")
    return f"{seconds / _UNIT_S[unit]:.0f} {unit}" if unit else f"{seconds / 365 / _DAY_S:.0f} y"


def count(n: int) -> str:
    """``987``, ``12.3k``, ``4.5M``."""
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if n >= factor:
            return f"{n / factor:.1f}{unit}"
    return str(n)


def context(n: int) -> str:
    """Tokens of context: ``4096`` as ``4k``, ``131072`` as ``128k``."""
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else f"{n}"


def model_name(model: str) -> str:
    """MODEL where there is little room: of a path the file's name alone."""
    return PurePath(model).name.removesuffix(".gguf") if model.endswith(".gguf") else model
