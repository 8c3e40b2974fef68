"""What a picture of a placement is: a heading and a row for each memory."""

from __future__ import annotations

from textual.geometry import Size
from textual.widget import Widget

from dynrun.tui.planning import Shown, rows_of


class PlacementView(Widget):
    """Subclasses write ``render``, of ``_shown``; empty without a placement."""

    def __init__(self, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._shown: Shown | None = None

    def show(self, shown: Shown | None) -> None:
        """Of this placement; None for none."""
        self._shown = shown
        self.refresh(layout=True)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return len(rows_of(self._shown)) + 1 if self._shown else 0
