"""Work a step ahead: what comes next is made while what came last is written."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

T = TypeVar("T")
_END = object()


def ahead(items: Iterator[T]) -> Generator[T]:
    """``items`` in order, each made in a thread while the one before is used: two exist at a time.

    What making one raises is raised where it would be used. Whoever stops early waits for the one that is being made.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        coming = pool.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = pool.submit(next, items, _END)
            yield cast("T", item)
