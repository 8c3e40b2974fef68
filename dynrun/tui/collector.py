"""Python's collector of garbage, kept from holding up the event loop while somebody types.

A full collection looks at every object there is and stops all threads for it: a fifth of a second below a long
conversation. So what stays for long is taken out of its sight, and the rest is looked at every few seconds: the fewer
there are, the sooner they are freed. Most of what drawing would leave is freed without (cycles.py).
"""

from __future__ import annotations

import gc
from itertools import count

EVERY_S = 3.0
# Objects that were made and kept; collections of the young, and of the middle-aged, of which there are as many as it
# likes: full ones are made here.
_COLLECT_AFTER = (2_000, 10, 1_000_000)
# After so many collections Textual's caches are full: they stay too.
_FULL_AFTER = 4


class Collector:
    """Collects when it is asked to."""

    def __init__(self) -> None:
        self._times = count(1)

    def settle(self) -> None:
        """What there is now stays for a while: imports, and the conversation above an answer that begins."""
        gc.freeze()
        gc.set_threshold(*_COLLECT_AFTER)
        self._times = count(1)

    def release(self) -> None:
        """Much of what was settled goes now: it is to be looked at again."""
        gc.unfreeze()

    def collect(self) -> bool:
        """Free what is garbage, unless nothing has come since the last time; whether it was done."""
        _, young, older = gc.get_count()
        if not (young or older):
            return False
        gc.collect()
        if next(self._times) == _FULL_AFTER:
            gc.freeze()
        return True


COLLECTOR = Collector()
