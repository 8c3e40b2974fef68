"""What is not settled is looked at, unless nothing has come; what fills at the beginning is settled too."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from dynrun.tui.collector import Collector

pytestmark = pytest.mark.tui


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


class Node:
    """Refers to itself."""

    def __init__(self) -> None:
        self.me = self


def kept() -> tuple[list[Node], weakref.ref[Node]]:
    """What is garbage once the list is cleared."""
    nodes = [Node()]
    return nodes, weakref.ref(nodes[0])


def made_some() -> None:
    """As many objects as no collection happens without."""
    gc.collect(0)


def test_what_has_come_is_looked_at_however_old() -> None:
    it = Collector()
    gc.collect()
    nodes, garbage = kept()
    gc.collect(1)
    nodes.clear()
    made_some()
    assert it.collect()
    assert garbage() is None
    assert not it.collect(), "nothing has come"


def test_what_is_settled_is_not_looked_at_until_it_is_released() -> None:
    it = Collector()
    nodes, garbage = kept()
    it.settle()
    nodes.clear()
    gc.collect()
    assert garbage() is not None
    it.release()
    gc.collect()
    assert garbage() is None


def test_what_an_answer_fills_in_its_first_seconds_is_settled_once() -> None:
    it = Collector()
    it.settle()
    before = gc.get_freeze_count()
    held = [Node() for _ in range(1000)]
    for _ in range(3):
        made_some()
        assert it.collect()
    assert gc.get_freeze_count() <= before
    made_some()
    assert it.collect()
    assert gc.get_freeze_count() >= before + len(held)
    more = [Node() for _ in range(1000)]
    for _ in range(8):
        made_some()
        assert it.collect()
    assert gc.get_freeze_count() < before + len(held) + len(more)
