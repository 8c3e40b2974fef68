"""Benches of the past, the latest first."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from rich.text import Text

from dynrun.runtime.bench_history import Result
from dynrun.tui.widgets.fitted_table import FittedTable


class HistoryTable(FittedTable):
    """Shows what it is given."""

    FIRST = "models"
    FIXED = (("when", 16), ("best", 24))

    def __init__(self, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id)
        self._results: list[Result] = []

    def show(self, results: Sequence[Result]) -> None:
        """``results``, the oldest first."""
        self._results = list(reversed(results))
        self.fill()

    def fill(self) -> None:
        row = self.cursor_row
        self.clear()
        for result in self._results:
            models = ", ".join(dict.fromkeys(row["model"] for row in result["rows"]))
            self.add_row(self.shortened(models), Text(when(result)), Text(_best(result)))
        self.move_cursor(row=row)

    @property
    def chosen(self) -> Result | None:
        """The bench under the cursor."""
        return self._results[self.cursor_row] if self.row_count else None


def when(result: Result) -> str:
    """Its time, as people read it."""
    try:
        return datetime.strptime(result["time"], "%Y-%m-%dT%H:%M:%S%z").strftime("%Y-%m-%d %H:%M")
    except (KeyError, ValueError, TypeError):
        return "–"


def _best(result: Result) -> str:
    """The fastest row of each kind."""
    found: dict[str, float] = {}
    for row in result["rows"]:
        found[row["test"]] = max(found.get(row["test"], 0.0), row["tokens_per_second"])
    return ", ".join(f"{test} {speed:.1f}" for test, speed in found.items())
