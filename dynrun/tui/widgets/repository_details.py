"""The quants of a repository on the Hub, to choose one for download."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import DataTable, Static

from dynrun.tui.words import size

if TYPE_CHECKING:
    from dynrun.hub.files import Variant
    from dynrun.hub.resolve import Found


class RepositoryDetails(Vertical):
    """Shows what it is given."""

    def __init__(self, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self.found: Found | None = None

    def compose(self) -> ComposeResult:
        yield Static(id="repository-head", markup=False)
        yield DataTable[Text](id="quants", cursor_type="row")

    def on_mount(self) -> None:
        table = self.query_one(DataTable)
        table.add_column("quant", width=16)
        table.add_column(Text("size", justify="right"), width=9)
        table.add_column(Text("files", justify="right"), width=6)
        table.add_column("", width=14)

    def show(self, found: Found, here: Collection[str] = ()) -> None:
        """``here``: the paths of files that are on this machine already."""
        self.found = found
        lines = [found.repository.name, found.note]
        self.query_one("#repository-head", Static).update("\n".join(line for line in lines if line))
        table = self.query_one(DataTable)
        table.clear()
        for kind, variant in self._variants():
            state = "shards missing" if variant.missing else ""
            if all(file.path in here for file in variant.files):
                state = "here"
            numbers = (size(variant.size), str(len(variant.files)))
            label = f"{kind} {variant.label}" if kind else variant.label
            cells = (Text(label), *(Text(number, justify="right") for number in numbers), Text(state))
            table.add_row(*cells, key=variant.first.path)

    def say(self, text: str) -> None:
        """A line in the place of quants: what is being fetched, or why it could not be."""
        self.found = None
        self.query_one("#repository-head", Static).update(text)
        self.query_one(DataTable).clear()

    @property
    def chosen(self) -> Variant | None:
        """The quant under the cursor."""
        table = self.query_one(DataTable)
        if self.found is None or not table.row_count:
            return None
        key = table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value
        return next((v for _, v in self._variants() if v.first.path == key), None)

    def _variants(self) -> list[tuple[str, Variant]]:
        """The quants, and then what goes beside them with its kind."""
        if self.found is None:
            return []
        beside = self.found.shelf.companions.items()
        return [*(("", v) for v in self.found.shelf.quants), *((kind, v) for kind, group in beside for v in group)]
