"""The models on this machine, a row each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.widgets import DataTable
from textual.widgets.data_table import ColumnKey

from dynrun.tui.catalog import LocalModel
from dynrun.tui.words import age, size

_FIXED = (("quant", 9), ("size", 8), ("bpw", 5), ("KLD", 7), ("used", 6))
_LEAST_NAME = 16


class ModelTable(DataTable[Text]):
    """Shows what it is given; the name takes what the other columns leave."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "cursor_down", "Down", show=False, id="models.down"),
        Binding("k", "cursor_up", "Up", show=False, id="models.up"),
    ]

    def __init__(self, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id, cursor_type="row", zebra_stripes=False)
        self._models: list[LocalModel] = []
        self._filter = ""

    def on_mount(self) -> None:
        self.add_column("name", key="name", width=_LEAST_NAME)
        for title, width in _FIXED:
            self.add_column(Text(title, justify="left" if title == "quant" else "right"), key=title, width=width)

    def on_resize(self) -> None:
        taken = sum(width + 2 * self.cell_padding for _, width in _FIXED) + 2 * self.cell_padding + 1
        width = max(_LEAST_NAME, self.size.width - taken)
        column = self.columns[ColumnKey("name")]
        if column.width != width:
            column.width = width
            self._fill()

    def show(self, models: Sequence[LocalModel]) -> None:
        """These, with the cursor where it was if its model is still there."""
        self._models = list(models)
        self._fill()

    def filter(self, words: str) -> None:
        """Only the models whose names have all of ``words``."""
        self._filter = words.lower()
        self._fill()

    @property
    def chosen(self) -> LocalModel | None:
        """The model under the cursor."""
        if not self.row_count:
            return None
        key = self.coordinate_to_cell_key(self.cursor_coordinate).row_key.value
        return next((model for model in self._models if str(model.listed.path) == key), None)

    def _fill(self) -> None:
        before = self.chosen
        self.clear()
        width = self.columns[ColumnKey("name")].width
        shown = [m for m in self._models if all(word in m.listed.name.lower() for word in self._filter.split())]
        for model in shown:
            self.add_row(*_cells(model, width), key=str(model.listed.path))
        if before is not None and before in shown:
            self.move_cursor(row=shown.index(before))


def _cells(model: LocalModel, width: int) -> list[Text]:
    listed = model.listed
    numbers = (
        size(listed.size_bytes) if listed.size_bytes else "–",
        f"{model.bpw:.2f}" if model.bpw else "–",
        "–" if model.kld is None else f"{model.kld:.4f}",
        age(time.time() - model.used_s) if model.used_s else "–",
    )
    # Text, never str: a table would read markup in a name.
    return [
        Text(shortened(listed.name, width)),
        Text(listed.quant),
        *(Text(number, justify="right") for number in numbers),
    ]


def shortened(name: str, width: int) -> str:
    """``name`` in at most ``width`` cells: the middle goes, as quants stand at the end."""
    if len(name) <= width:
        return name
    tail = (width - 1) * 2 // 3
    return f"{name[: width - 1 - tail]}…{name[len(name) - tail :]}"
