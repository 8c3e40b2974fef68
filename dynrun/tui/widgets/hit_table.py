"""What the Hub's search found, a repository a row."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from dynrun.tui.widgets.fitted_table import FittedTable, number
from dynrun.tui.words import age, count

if TYPE_CHECKING:
    from dynrun.hub.search import Hit


class HitTable(FittedTable):
    """Shows what it is given; a closed repository has a key before its name."""

    FIRST = "on the Hub"
    FIXED = (("downloads", 9), ("likes", 6), ("changed", 7))
    RIGHT = frozenset({"downloads", "likes", "changed"})
    LEAST = 20

    def __init__(self, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id)
        self._hits: list[Hit] = []

    def show(self, hits: Sequence[Hit]) -> None:
        """These."""
        self._hits = list(hits)
        self.fill()

    def fill(self) -> None:
        self.clear()
        now = datetime.now(UTC)
        for hit in self._hits:
            changed = age((now - hit.modified).total_seconds()) if hit.modified else "–"
            numbers = (count(hit.downloads), count(hit.likes), changed)
            name = f"{'⚿ ' if hit.gated else ''}{hit.name}"
            self.add_row(self.shortened(name), *map(number, numbers), key=hit.name)

    @property
    def chosen(self) -> str:
        """The repository under the cursor; empty where there is none."""
        if not self.row_count:
            return ""
        return self.coordinate_to_cell_key(self.cursor_coordinate).row_key.value or ""
