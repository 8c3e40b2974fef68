"""Efficiency: accuracy over chance for each unit of the file's size, as Unsloth defines it for MMLU 5-shot.

(accuracy in percent − 25) / size. Unsloth's published sizes are GiB though labelled GB (Gemma 3 27B Q8_0: 71.60%,
26.74, efficiency 1.74; the file has 28.7 GB), so the number to compare with theirs is per GiB; both are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GIB, GB = 2**30, 10**9
CHANCE_PERCENT = 25.0


@dataclass(frozen=True)
class Efficiency:
    """Percentage points over chance of four answers, per GiB (the published unit) and per GB of the whole file."""

    per_gib: float
    per_gb: float

    def to_json(self) -> dict[str, Any]:
        """As `dynrun eval mmlu` prints it."""
        return {"per_gib": self.per_gib, "per_gb": self.per_gb}


def efficiency(accuracy: float, size_bytes: int) -> Efficiency:
    """Of an ``accuracy`` as a fraction of 1. Raises ValueError for a file without bytes."""
    if size_bytes <= 0:
        raise ValueError(f"a size of {size_bytes} bytes")
    points = 100 * accuracy - CHANCE_PERCENT
    return Efficiency(points * GIB / size_bytes, points * GB / size_bytes)
