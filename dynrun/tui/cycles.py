"""What Textual leaves behind in cycles of references each time that it lays out and draws, freed without them.

Only a full collection of garbage would free it, and that stops everything for longer than a key may take
(collector.py). Each part is a copy of nothing: it only gives back, or clears, what Textual would have kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Any

from rich.segment import Segment
from textual._compositor import Compositor, ReflowResult
from textual._styles_cache import StylesCache
from textual.cache import FIFOCache
from textual.geometry import Size
from textual.map_geometry import MapGeometry
from textual.strip import Strip
from textual.widget import Widget

_divide, _size_updated = Strip.divide, Widget._size_updated
# By name, how much each of them holds.
SIZES = {name: held._maxsize for name in Strip.__slots__ if isinstance(held := getattr(Strip(()), name), FIFOCache)}


class _OnDemand:
    """One of a line's caches, made when it is looked into: few lines use more than one of seven."""

    def __init__(self, slot: Any, size: int) -> None:
        self._slot, self._size = slot, size

    def __get__(self, strip: Strip | None, _: type[Strip]) -> Any:
        try:
            return self._slot.__get__(strip)
        except AttributeError:
            self._slot.__set__(strip, made := FIFOCache[Any, Any](self._size))
            return made


def _made(self: Strip, segments: Iterable[Segment], cell_length: int | None = None) -> None:
    """As Textual makes a line, but for its caches."""
    self._segments = list(segments)
    self._cell_length = cell_length
    self._render_cache = self._link_ids = self._cell_count = None


def _divided(self: Strip, cuts: Iterable[int]) -> Sequence[Strip]:
    """A line that is not cut at all is itself: Textual's own would keep it in its own cache."""
    length = self.cell_length
    within = [cut for cut in cuts if cut <= length]
    return [self] if within == [length] else _divide(self, within)


def _sized(self: Widget, size: Size, virtual_size: Size, container_size: Size, layout: bool = True) -> bool:
    """What is in a widget that does not scroll was just laid out in its new size. Textual would lay out all again."""
    scrolls = self.styles.overflow_y != "hidden" or self.styles.overflow_x != "hidden"
    return _size_updated(self, size, virtual_size, container_size, layout and scrolls)


@cache
def lean_strips() -> None:
    """From now on lines of the screen are small, and go when they are no longer needed."""
    for name, size in SIZES.items():
        setattr(Strip, name, _OnDemand(getattr(Strip, name), size))
    Strip.__init__ = _made  # type: ignore[method-assign]
    Strip.divide = _divided  # type: ignore[method-assign]
    Widget._size_updated = _sized  # type: ignore[method-assign]
    # Textual's answers are kept by who asked: the drawn lines of a thousand widgets that are gone would stay.
    colors: Any = StylesCache.get_inner_outer
    by_color: Any = lru_cache(maxsize=1024)(colors.__wrapped__)
    StylesCache.get_inner_outer = classmethod(by_color)  # type: ignore[method-assign, assignment]


def forget_children(widget: Widget) -> None:
    """Children of ``widget`` were removed, and it may not be laid out or asked again for long: until then Textual would
    keep them, as its last answers."""
    widget._arrangement_cache.clear()
    widget._query_one_cache.clear()
    nodes = widget._nodes
    nodes._displayed_nodes = nodes._displayed_visible_nodes = (-1, [])


class LeanCompositor(Compositor):
    """The function that finds where everything is refers to itself and to all it found: it keeps nothing of it."""

    def _arrange_root(
        self, root: Widget, size: Size, visible_only: bool = True
    ) -> tuple[dict[Widget, MapGeometry], set[Widget]]:
        places, widgets = super()._arrange_root(root, size, visible_only)
        found = dict(places), set(widgets)
        places.clear()
        widgets.clear()
        return found

    def reflow(self, parent: Widget, size: Size) -> ReflowResult:
        """Textual would find again where everything is if it was scrolled before."""
        result = super().reflow(parent, size)
        self._full_map_invalidated = False
        return result
