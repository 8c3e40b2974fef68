"""The quants of what is planned, with verdict and predicted speed."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text
from textual.widgets import DataTable

from dynrun.tui.planning import VERDICTS, Quant
from dynrun.tui.words import size

_STYLES = {"gpu": "green", "gpu+ram": "green", "ram": "green", "disk": "yellow", "no": "red"}


class QuantTable(DataTable[Text]):
    """Shows what it is given; rows keep their order."""

    def __init__(self, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id, cursor_type="row")
        self.quants: list[Quant] = []

    def on_mount(self) -> None:
        self.add_column("quant", key="quant", width=14)
        self.add_column(Text("size", justify="right"), key="size", width=8)
        self.add_column("verdict", key="verdict", width=16)
        self.add_column(Text("tok/s", justify="right"), key="speed", width=7)
        self.add_column("", key="here", width=5)

    def show(self, quants: Sequence[Quant]) -> None:
        """All of them anew."""
        self.quants = list(quants)
        self.clear()
        for index, quant in enumerate(self.quants):
            self.add_row(*_cells(quant), key=str(index))

    def update(self, index: int, quant: Quant) -> None:
        """One of them, or one more."""
        if index >= len(self.quants):
            self.quants.append(quant)
            self.add_row(*_cells(quant), key=str(index))
            return
        self.quants[index] = quant
        for column, cell in zip(("quant", "size", "verdict", "speed", "here"), _cells(quant), strict=True):
            self.update_cell(str(index), column, cell)

    def recommend(self, index: int) -> None:
        """Mark the best for this machine."""
        label = Text.assemble(self.quants[index].label, (" ★", "yellow"))
        self.update_cell(str(index), "quant", label)

    @property
    def chosen(self) -> int:
        """The row under the cursor; -1 for none."""
        return self.cursor_row if self.row_count else -1


def _cells(quant: Quant) -> list[Text]:
    placement = quant.placement
    if placement is None:
        verdict, speed = Text(quant.error or "…", style="red" if quant.error else "dim"), "–"
    else:
        verdict = Text(VERDICTS[placement.verdict], style=_STYLES[placement.verdict])
        speed = f"{placement.tokens_per_second:.1f}" if placement.fits else "–"
    here = "here" if quant.path else ""
    right = [Text(cell, justify="right") for cell in (size(quant.size_bytes), speed)]
    return [Text(quant.label), right[0], verdict, right[1], Text(here, style="dim")]
