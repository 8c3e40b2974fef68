"""Jump mode: a letter on everything that can be focused; the letter goes there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from textual import events
from textual.app import ComposeResult
from textual.geometry import Region
from textual.screen import ModalScreen, Screen
from textual.widget import Widget
from textual.widgets import Label

from dynrun.tui.widgets.room_header import RoomTab

LETTERS = "asdfghjklqwertyuiopzxcvbnm"


@dataclass(frozen=True)
class Target:
    """A widget, where its label goes (column, line), and its letter."""

    widget: Widget
    x: int
    y: int
    letter: str


def targets(screen: Screen[Any]) -> list[Target]:
    """What can be jumped to on ``screen``, from top to bottom."""
    found = [*screen.query(RoomTab), *(widget for widget in screen.focus_chain if isinstance(widget, Widget))]
    visible = [(widget, _seen(widget, screen)) for widget in found]
    placed = sorted(((w, r) for w, r in visible if r.area), key=lambda pair: (pair[1].y, pair[1].x))
    return [Target(w, r.x, r.y, letter) for (w, r), letter in zip(placed, LETTERS, strict=False)]


def _seen(widget: Widget, screen: Screen[Any]) -> Region:
    region = widget.region.intersection(screen.region)
    for ancestor in widget.ancestors:
        if isinstance(ancestor, Widget):
            region = region.intersection(ancestor.region)
    return region


class JumpScreen(ModalScreen[None]):
    """Any key ends it; the letter of a target goes to the target first."""

    CSS_PATH = "jump.tcss"

    def __init__(self, found: list[Target]) -> None:
        super().__init__()
        self._targets = {target.letter: target for target in found}

    def compose(self) -> ComposeResult:
        for target in self._targets.values():
            label = Label(f" {target.letter} ", classes="jump")
            label.styles.offset = (target.x, target.y)
            yield label

    def on_key(self, event: events.Key) -> None:
        event.stop()
        self.dismiss()
        if (target := self._targets.get(event.character or "")) is None:
            return
        if isinstance(target.widget, RoomTab):
            target.widget.go()
        else:
            self.app.call_later(target.widget.focus)

    def on_click(self) -> None:
        self.dismiss()
