"""The rows of a bench: speeds with their intervals, and bars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from dynrun.runtime.bench_history import Result
from dynrun.tui.widgets.fitted_table import FittedTable, number

_BAR = 12


class SpeedTable(FittedTable):
    """Shows what it is given; bars of prompt processing and of generation have scales of their own."""

    FIRST = "model"
    FIXED = (("where", 8), ("test", 6), ("tok/s", 8), ("95%", 6), ("", _BAR), ("memory", 6))
    RIGHT = frozenset({"tok/s", "95%", "memory"})
    LEAST = 12

    def __init__(self, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id)
        self._result: Result = {"rows": []}

    def show(self, result: Result) -> None:
        """One bench."""
        self._result = result
        self.fill()

    def fill(self) -> None:
        self.clear()
        longest: dict[str, float] = {}
        for row in self._result["rows"]:
            kind = row["test"][:2]
            longest[kind] = max(longest.get(kind, 0.0), row["ci95"][1])
        for row in self._result["rows"]:
            cells = _cells(row, longest[row["test"][:2]], self.colour("primary"), self.colour("warning"))
            self.add_row(self.shortened(row["model"]), *cells)


def _cells(row: Mapping[str, Any], longest: float, primary: str, warning: str) -> list[Text]:
    speed, (low, high) = row["tokens_per_second"], row["ci95"]
    share = row["bandwidth_share"]
    noise = Text(f"±{(high - low) / 2 / speed:.1%}", style=warning if row["noisy"] else "", justify="right")
    percent = number("" if share is None else f"{share:.0%}")
    return [
        *(Text(row["placement"]), Text(row["test"])),
        *(number(f"{speed:.1f}"), noise, bar(low, high, longest, primary), percent),
    ]


def bar(low: float, high: float, longest: float, colour: str) -> Text:
    """Filled to the interval's lower end, shaded to its upper one."""
    solid = round(max(low, 0.0) / longest * _BAR)
    until = max(solid, round(min(high, longest) / longest * _BAR))
    return Text("█" * solid + "▒" * (until - solid), style=colour)
