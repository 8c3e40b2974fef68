"""Work side by side on threads, with torch on one thread in each of them.

torch lets go of the interpreter's lock in every operation: large ones scale. Threads of its own in each operation do as
much on an idle machine, but wait for one another at every one's end, and long where the machine is busy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Threads:
    """``n`` threads. What runs on one of them may wait for other threads, not for these."""

    def __init__(self, n: int) -> None:
        self._pool = ThreadPoolExecutor(n)

    def map(self, function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """Results in the order of ``items``."""
        with _single():
            if len(items) < 2:
                return [function(item) for item in items]
            return list(self._pool.map(function, items))


_entered, _lock = 0, threading.Lock()


@contextmanager
def _single() -> Iterator[None]:
    """torch on one thread, in this thread and all that begin to use it, until the first to come here has left."""
    global _entered
    import torch

    with _lock:
        _entered += 1
        if is_first := _entered == 1:
            before = torch.get_num_threads()
            torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _entered -= 1
        if is_first:
            torch.set_num_threads(before)
