"""What comes next is made while the last is used."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from dynrun.scoring.ahead import ahead


def test_the_next_is_begun_before_the_last_is_used() -> None:
    begun = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        begun.set()
        yield 2

    coming = ahead(items())
    assert next(coming) == 1
    assert begun.wait(10)
    assert list(coming) == [2]


def test_an_error_comes_where_its_item_would() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    coming = ahead(items())
    assert next(coming) == 1
    with pytest.raises(KeyboardInterrupt):
        next(coming)


def test_who_stops_early_has_nothing_running_behind() -> None:
    release, made = threading.Event(), []

    def items() -> Iterator[int]:
        yield 1
        release.wait(10)
        made.append(2)
        yield 2
        made.append(3)

    with closing(ahead(items())) as coming:
        assert next(coming) == 1
        release.set()
    assert made == [2]


def test_nothing_comes_of_nothing() -> None:
    assert list(ahead(iter(()))) == []
