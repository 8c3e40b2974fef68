"""The models on this machine, a row each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType

from dynrun.tui.catalog import LocalModel
from dynrun.tui.widgets.fitted_table import FittedTable, number
from dynrun.tui.words import age, size


class ModelTable(FittedTable):
    """Shows what it is given."""

    FIXED = (("quant", 9), ("size", 8), ("bpw", 5), ("KLD", 7), ("used", 6))
    RIGHT = frozenset({"size", "bpw", "KLD", "used"})
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "cursor_down", "Down", show=False, id="models.down"),
        Binding("k", "cursor_up", "Up", show=False, id="models.up"),
    ]

    def __init__(self, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id)
        self._models: list[LocalModel] = []
        self._filter = ""

    def show(self, models: Sequence[LocalModel]) -> None:
        """These, with the cursor where it was if its model is still there."""
        self._models = list(models)
        self.fill()

    def filter(self, words: str) -> None:
        """Only the models whose names have all of ``words``."""
        self._filter = words.lower()
        self.fill()

    @property
    def chosen(self) -> LocalModel | None:
        """The model under the cursor."""
        if not self.row_count:
            return None
        key = self.coordinate_to_cell_key(self.cursor_coordinate).row_key.value
        return next((model for model in self._models if str(model.listed.path) == key), None)

    def fill(self) -> None:
        before = self.chosen
        self.clear()
        shown = [m for m in self._models if all(word in m.listed.name.lower() for word in self._filter.split())]
        for model in shown:
            cells = (self.shortened(model.listed.name), Text(model.listed.quant), *_numbers(model))
            self.add_row(*cells, key=str(model.listed.path))
        paths = [model.listed.path for model in shown]
        if before is not None and before.listed.path in paths:
            self.move_cursor(row=paths.index(before.listed.path))


def _numbers(model: LocalModel) -> list[Text]:
    n = model.listed.size_bytes
    texts = (
        size(n) if n else "–",
        f"{model.bpw:.2f}" if model.bpw else "–",
        "–" if model.kld is None else f"{model.kld:.4f}",
        age(time.time() - model.used_s) if model.used_s else "–",
    )
    return [number(text) for text in texts]
