"""The rooms of the app: what each mode is called and which screen it opens. Screens are imported when first entered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynrun.tui.screens.room import RoomScreen


@dataclass(frozen=True)
class Room:
    """``key``: function key; ``screen``: module under dynrun.tui.screens and class."""

    mode: str
    title: str
    key: str
    screen: str
    purpose: str

    def open(self) -> RoomScreen:
        """The screen, made anew."""
        return self.screen_class()()

    def screen_class(self) -> type[RoomScreen]:
        """The screen's class; importing it may take a moment."""
        module, name = self.screen.split(":")
        found: type[RoomScreen] = getattr(import_module(f"dynrun.tui.screens.{module}"), name)
        return found


ROOMS = (
    Room("models", "Models", "f2", "models:ModelsScreen", "find, download and look at models"),
    Room("plan", "Plan", "f3", "plan:PlanScreen", "see what fits on this machine and how fast it will be"),
    Room("chat", "Chat", "f4", "chat:ChatScreen", "talk to a model"),
    Room("make", "Make", "f5", "make:MakeScreen", "make the best quant of a size, and prove it"),
    Room("bench", "Bench", "f6", "bench:BenchScreen", "measure tokens per second"),
)
BY_MODE = {room.mode: room for room in ROOMS}


def modes() -> dict[str, Callable[[], RoomScreen]]:
    """Textual's modes: a factory for each room."""
    return {room.mode: room.open for room in ROOMS}
