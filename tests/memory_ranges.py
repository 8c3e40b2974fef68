"""Ranges of a file in memory, in the place of dynrun.hub.ranges.RangeReader."""

from __future__ import annotations

from typing import Self


class Ranges:
    """``fetched_bytes``: how many were asked for and there."""

    def __init__(self, data: bytes) -> None:
        self.data, self.fetched_bytes = data, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, offset: int, length: int) -> bytes:
        found = self.data[offset : offset + length]
        self.fetched_bytes += len(found)
        return found
