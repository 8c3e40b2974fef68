"""What a placement needs of each memory, as bars: weights, KV cache, compute buffers, the rest, and what is free."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text

from dynrun.tui.planning import parts_of, rows_of
from dynrun.tui.widgets.placement_view import PlacementView
from dynrun.tui.words import gib

_PARTS = ("weights", "KV", "compute", "other")


class MemoryBars(PlacementView):
    """A bar for each memory; one that is overfull is marked, and its bar ends at its edge."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {*(f"bars--{part.lower()}" for part in _PARTS), "bars--free", "bars--over"}
    DEFAULT_CSS = """
    MemoryBars {
        height: auto;
        .bars--weights { color: $primary; }
        .bars--kv { color: $accent; }
        .bars--compute { color: $success; }
        .bars--other { color: $secondary; }
        .bars--free { color: $border; }
        .bars--over { color: $error; text-style: bold; }
    }
    """

    def render(self) -> Text:
        if self._shown is None:
            return Text()
        style = self.get_component_rich_style
        text = Text(" " * 7, no_wrap=True, overflow="crop")
        for part in _PARTS:
            text.append("■", style(f"bars--{part.lower()}", partial=True))
            text.append(f" {part}  ")
        for name, index, free, _ in rows_of(self._shown):
            text.append("\n")
            text.append_text(self._bar(name, parts_of(self._shown.ledger, index), free))
        return text

    def _bar(self, name: str, parts: dict[str, int], free: int) -> Text:
        need = sum(parts.values())
        numbers = f" {gib(need):>8} of {gib(free)}"
        width = max(self.content_size.width - 7 - len(numbers), 8)
        style = self.get_component_rich_style
        text, drawn, so_far = Text(f"{name[:6]:7}"), 0, 0
        for part, n in parts.items():
            so_far += n
            until = min(width, round(so_far / max(free, 1) * width))
            text.append("█" * (until - drawn), style(f"bars--{part.lower()}", partial=True))
            drawn = max(drawn, until)
        text.append("─" * (width - drawn), style("bars--free", partial=True))
        text.append(numbers, style("bars--over", partial=True) if need > free else None)
        return text
