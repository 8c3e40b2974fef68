"""The quants of what is planned, with verdict and predicted speed."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from dynrun.tui.planning import VERDICTS, Quant
from dynrun.tui.widgets.fitted_table import FittedTable, number
from dynrun.tui.words import size

_COLOURS = {"gpu": "success", "gpu+ram": "success", "ram": "success", "disk": "warning", "no": "error"}


class QuantTable(FittedTable):
    """Shows what it is given; rows keep their order."""

    FIRST = "quant"
    FIXED = (("size", 8), ("verdict", 16), ("tok/s", 7), ("", 5))
    RIGHT = frozenset({"size", "tok/s"})
    LEAST = 14

    def __init__(self, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id)
        self.quants: list[Quant] = []
        self._best = -1

    def show(self, quants: Sequence[Quant]) -> None:
        """All of them anew."""
        self.quants, self._best = list(quants), -1
        self.fill()

    def fill(self) -> None:
        row = self.cursor_row
        self.clear()
        for index in range(len(self.quants)):
            self.add_row(*self._cells(index), key=str(index))
        self.move_cursor(row=row)

    def update(self, index: int, quant: Quant) -> None:
        """One of them, or one more."""
        if index >= len(self.quants):
            self.quants.append(quant)
            self.add_row(*self._cells(index), key=str(index))
            return
        self.quants[index] = quant
        self._refill(index)

    def recommend(self, index: int) -> None:
        """Mark the best for this machine."""
        self._best = index
        self._refill(index)

    def _refill(self, index: int) -> None:
        for column, cell in zip(self.columns, self._cells(index), strict=True):
            self.update_cell(str(index), column, cell)

    @property
    def chosen(self) -> int:
        """The row under the cursor; -1 for none."""
        return self.cursor_row if self.row_count else -1

    def _cells(self, index: int) -> list[Text]:
        quant = self.quants[index]
        placement = quant.placement
        if placement is None:
            verdict, speed = Text(quant.error or "…", style=self.colour("error") if quant.error else "dim"), "–"
        else:
            verdict = Text(VERDICTS[placement.verdict], style=self.colour(_COLOURS[placement.verdict]))
            speed = f"{placement.tokens_per_second:.1f}" if placement.fits else "–"
        label = self.shortened(f"{quant.label}{' ★' if index == self._best else ''}")
        here = Text("here" if quant.path else "", style="dim")
        return [label, number(size(quant.size_bytes)), verdict, number(speed), here]
