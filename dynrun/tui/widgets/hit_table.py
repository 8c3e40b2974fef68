"""What the Hub's search found, a repository a row."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from rich.text import Text
from textual.widgets import DataTable
from textual.widgets.data_table import ColumnKey

from dynrun.hub.search import Hit
from dynrun.tui.widgets.model_table import shortened
from dynrun.tui.words import age, count

_FIXED = (("downloads", 9), ("likes", 6), ("changed", 7))
_LEAST_NAME = 20


class HitTable(DataTable[Text]):
    """Shows what it is given; a closed repository has a key before its name."""

    def __init__(self, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id, cursor_type="row")
        self._hits: list[Hit] = []

    def on_mount(self) -> None:
        self.add_column("on the Hub", key="name", width=_LEAST_NAME)
        for title, width in _FIXED:
            self.add_column(Text(title, justify="right"), key=title, width=width)

    def on_resize(self) -> None:
        taken = sum(width + 2 * self.cell_padding for _, width in _FIXED) + 2 * self.cell_padding + 1
        width = max(_LEAST_NAME, self.size.width - taken)
        column = self.columns[ColumnKey("name")]
        if column.width != width:
            column.width = width
            self.show(self._hits)

    def show(self, hits: Sequence[Hit]) -> None:
        """These."""
        self._hits = list(hits)
        self.clear()
        width = self.columns[ColumnKey("name")].width
        now = datetime.now(UTC)
        for hit in self._hits:
            changed = age((now - hit.modified).total_seconds()) if hit.modified else "–"
            numbers = (count(hit.downloads), count(hit.likes), changed)
            name = shortened(f"{'⚿ ' if hit.gated else ''}{hit.name}", width)
            self.add_row(Text(name), *(Text(number, justify="right") for number in numbers), key=hit.name)

    @property
    def chosen(self) -> str:
        """The repository under the cursor; empty where there is none."""
        if not self.row_count:
            return ""
        return self.coordinate_to_cell_key(self.cursor_coordinate).row_key.value or ""
