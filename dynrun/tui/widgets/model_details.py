"""All about one model, in tabs: facts, tensors, the chat template, files."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.widgets import DataTable, Static, TabbedContent, TabPane

from dynrun.tui.catalog import Details
from dynrun.tui.words import size

_NO_TEMPLATE = "(none: it is given plain text)"


class ModelDetails(Vertical):
    """Shows what it is given; an empty one until then."""

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

    def on_mount(self) -> None:
        self.query_one("#tensor-table", DataTable).add_columns("tensor", "type", "shape", "size")

    def show(self, details: Details) -> None:
        """Of this model."""
        self.query_one("#facts-table", Static).update(_pairs(details.facts))
        self.query_one("#template-text", Static).update(Text(details.template or _NO_TEMPLATE))
        self.query_one("#files-table", Static).update(_pairs([(name, size(n)) for name, n in details.files]))
        table = self.query_one("#tensor-table", DataTable)
        table.clear()
        for name, kind, shape, n in details.tensors:
            table.add_row(Text(name), Text(kind), Text(shape), Text(size(n), justify="right"))

    def clear(self) -> None:
        """Nothing is chosen."""
        for name in ("#facts-table", "#template-text", "#files-table"):
            self.query_one(name, Static).update("")
        self.query_one("#tensor-table", DataTable).clear()


def _pairs(pairs: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(name), Text(value))
    return table
