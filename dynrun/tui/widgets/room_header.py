"""The first line of every room: the rooms, and what goes on in the background."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widgets import Static

from dynrun.tui.messages import Visit
from dynrun.tui.rooms import ROOMS, Room


class RoomTab(Static):
    """One room's name and key; a click goes there."""

    ALLOW_SELECT = False

    def __init__(self, room: Room, active: bool) -> None:
        super().__init__(f"[b]{room.key.upper()}[/b] {room.title}", classes="-active" if active else "")
        self.room = room
        self.tooltip = room.purpose

    def on_click(self) -> None:
        self.go()

    def go(self) -> None:
        self.post_message(Visit(self.room.mode))


class RoomHeader(Horizontal):
    """``mode``: the room that this header stands in."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self._mode = mode

    def compose(self) -> ComposeResult:
        yield Static("dynrun", id="brand")
        for room in ROOMS:
            yield RoomTab(room, room.mode == self._mode)
        yield Static("", id="activity", markup=False)

    def on_mount(self) -> None:
        self.watch(self.app, "activity", self._show)

    def _show(self, activity: dict[str, str]) -> None:
        self.query_one("#activity", Static).update(" · ".join(activity.values()))
