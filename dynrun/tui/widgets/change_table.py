"""Two benches side by side: what became faster or slower beyond the noise of both."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from dynrun.runtime.bench_history import Compared
from dynrun.tui.widgets.fitted_table import FittedTable, number

_COLOURS = {"faster": "success", "slower": "error"}


class ChangeTable(FittedTable):
    """Shows what it is given."""

    FIRST = "model"
    FIXED = (("where", 6), ("test", 6), ("before", 7), ("after", 7), ("change", 7), ("verdict", 10))
    RIGHT = frozenset({"before", "after", "change"})
    LEAST = 12

    def __init__(self, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id)
        self._changes: list[Compared] = []

    def show(self, changes: Sequence[Compared]) -> None:
        """These."""
        self._changes = list(changes)
        self.fill()

    def fill(self) -> None:
        self.clear()
        for one in self._changes:
            verdict = one.change.verdict if one.change.verdict in _COLOURS else "noise"
            numbers = (f"{one.before:.1f}", f"{one.after:.1f}", f"{one.change.ratio - 1:+.1%}")
            told = Text(verdict, style=self.colour(_COLOURS[verdict]) if verdict in _COLOURS else "dim")
            cells = (Text(one.placement), Text(one.test), *map(number, numbers), told)
            self.add_row(self.shortened(one.model), *cells)
