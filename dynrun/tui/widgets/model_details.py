"""All about one model, in tabs: facts, tensors, the chat template, files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.widgets import DataTable, Static, TabbedContent, TabPane

from dynrun.tui.catalog import Details
from dynrun.tui.words import size

_NO_TEMPLATE = "(none: it is given plain text)"


class ModelDetails(Vertical):
    """Shows what it is given; an empty one until then. A thousand tensors are laid out when they are looked at."""

    def __init__(self, *, id: str) -> None:  # noqa: A002 (as Textual calls it)
        super().__init__(id=id)
        self._tensors: Sequence[tuple[str, str, str, int]] = ()

    def compose(self) -> ComposeResult:
        with TabbedContent():
            with TabPane("Facts", id="facts"), VerticalScroll():
                yield Static(id="facts-table")
            with TabPane("Tensors", id="tensors"):
                yield DataTable[Text](id="tensor-table", cursor_type="row")
            with TabPane("Template", id="template"), VerticalScroll():
                yield Static(id="template-text", markup=False)
            with TabPane("Files", id="files"), VerticalScroll():
                yield Static(id="files-table")

    def show(self, details: Details) -> None:
        """Of this model."""
        self.query_one("#facts-table", Static).update(_pairs(details.facts))
        self.query_one("#template-text", Static).update(Text(details.template or _NO_TEMPLATE))
        self.query_one("#files-table", Static).update(_pairs([(name, size(n)) for name, n in details.files]))
        self._tensors = details.tensors
        self.query_one("#tensor-table", DataTable).clear()
        self._fill()

    @on(TabbedContent.TabActivated)
    def _fill(self) -> None:
        if self.query_one(TabbedContent).active != "tensors" or not self._tensors:
            return
        rows = [(name, kind, shape, f"{size(n):>9}") for name, kind, shape, n in self._tensors]
        self._tensors = ()
        table = self.query_one("#tensor-table", DataTable)
        table.clear(columns=True)
        for title, *cells in zip(("tensor", "type", "shape", "size"), *rows, strict=True):
            # Textual would look for the longest cell by drawing each.
            table.add_column(title, width=max(map(len, (title, *cells))))
        table.add_rows([Text(cell) for cell in row] for row in rows)

    def clear(self) -> None:
        """Nothing is chosen."""
        for name in ("#facts-table", "#template-text", "#files-table"):
            self.query_one(name, Static).update("")
        self._tensors = ()
        self.query_one("#tensor-table", DataTable).clear()


def _pairs(pairs: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(name), Text(value))
    return table
