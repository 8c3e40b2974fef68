"""A range of a file that one connection fetches, and how it is shared with another one."""

from __future__ import annotations

import time
from dataclasses import dataclass

from dynrun.hub.http import READ_BYTES
from dynrun.hub.part import Part

# More than httpx2 hands on at a time.
_LONGEST_CHUNK = 2 * READ_BYTES


@dataclass
class Piece:
    """Bytes [position, end) of ``part`` are somebody's to fetch; the answer that is coming in ends at ``stop``."""

    part: Part
    position: int
    end: int
    stop: int = 0
    start: int = 0
    started: float = 0.0

    def begin(self) -> None:
        """The clock runs."""
        self.start, self.started = self.position, time.monotonic()

    def seconds_left(self, at_least: float) -> float:
        """At the rate so far; none where the clock runs for less than ``at_least``: that tells no rate."""
        elapsed = time.monotonic() - self.started
        rate = (self.position - self.start) / max(elapsed, 1e-3)
        return (self.end - self.position) / max(rate, 1.0) if elapsed >= at_least else 0.0

    def halve(self) -> Piece:
        """The second half, for somebody else. The first ends a little after the middle, at which its answer is left.

        An answer comes in chunks, which do not end where one likes: so nothing is fetched twice.
        """
        self.stop = (self.position + self.end) // 2
        rest = Piece(self.part, self.stop + _LONGEST_CHUNK, self.end)
        self.end = rest.position
        return rest
