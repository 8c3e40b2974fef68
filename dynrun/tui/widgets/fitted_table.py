"""A table whose first column takes what the others leave."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.widgets import DataTable
from textual.widgets.data_table import ColumnKey


class FittedTable(DataTable[Text]):
    """Subclasses set the first column's title, the others' titles and widths (those in ``RIGHT`` are numbers), and fill
    themselves in :meth:`fill`. Cells are Text, never str: a table would read markup in a name."""

    FIRST: ClassVar[str] = "name"
    FIXED: ClassVar[tuple[tuple[str, int], ...]] = ()
    RIGHT: ClassVar[frozenset[str]] = frozenset()
    LEAST: ClassVar[int] = 16

    def __init__(self, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id, cursor_type="row")

    def on_mount(self) -> None:
        self.add_column(self.FIRST, key="first", width=self.LEAST)
        for title, width in self.FIXED:
            self.add_column(Text(title, justify="right" if title in self.RIGHT else "left"), key=title, width=width)

    def on_resize(self) -> None:
        padding = 2 * self.cell_padding
        width = max(self.LEAST, self.size.width - sum(w + padding for _, w in self.FIXED) - padding - 1)
        column = self.columns[ColumnKey("first")]
        if column.width != width:
            column.width = width
            self.fill()

    @property
    def first_width(self) -> int:
        """Cells of the first column."""
        return self.columns[ColumnKey("first")].width

    def colour(self, name: str) -> str:
        """A colour of the theme, for cells."""
        return self.app.theme_variables.get(name, "")

    def fill(self) -> None:
        """Put all rows in anew."""

    def shortened(self, name: str) -> Text:
        """``name`` in the first column."""
        return Text(shortened(name, self.first_width))


def number(text: str) -> Text:
    """A cell of a number."""
    return Text(text, justify="right")


def shortened(name: str, width: int) -> str:
    """``name`` in at most ``width`` cells: the middle goes, as quants stand at the end."""
    if len(name) <= width:
        return name
    tail = (width - 1) * 2 // 3
    return f"{name[: width - 1 - tail]}…{name[len(name) - tail :]}"
