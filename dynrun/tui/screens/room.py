"""What every room of the app is: a screen with the header of rooms, its body and the footer of keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from textual.app import ComposeResult, SystemCommand
from textual.dom import DOMNode
from textual.screen import Screen
from textual.widgets import Footer

from dynrun.tui.widgets.room_header import RoomHeader

if TYPE_CHECKING:
    from dynrun.tui.app import DynrunApp
    from dynrun.tui.messages import Visit


class RoomScreen(Screen[None]):
    """A room. Subclasses set ``MODE``, ``HELP`` (Markdown), CSS_PATH, BINDINGS with ids, and write ``body``.

    ``KEYED``: widgets of the room that have bindings with ids of their own, so that they can be remapped too.
    """

    MODE: ClassVar[str] = ""
    HELP: ClassVar[str] = ""
    KEYED: ClassVar[tuple[type[DOMNode], ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        # Its widgets are styled when they are mounted. Textual takes a new screen for one with old styles, and parses
        # and applies all stylesheets again on its first two visits: a quarter of a second each.
        self._css_update_count = self.app._css_update_count

    @property
    def dynrun(self) -> DynrunApp:
        """The app, as its own type."""
        from dynrun.tui.app import DynrunApp

        assert isinstance(self.app, DynrunApp)
        return self.app

    def compose(self) -> ComposeResult:
        yield RoomHeader(self.MODE)
        yield from self.body()
        yield Footer()

    def body(self) -> ComposeResult:
        """The widgets between header and footer."""
        yield from ()

    async def visit(self, visit: Visit) -> None:
        """Somebody came here from another room, with a model in hand. The screen is mounted."""

    def models_changed(self) -> None:
        """The models on this machine are no longer the same."""

    def stop(self) -> bool:
        """Ctrl+C: stop what the user sees running here; False where there is nothing."""
        return False

    async def leave(self) -> None:
        """The app quits: end child processes."""

    def commands(self) -> Iterable[SystemCommand]:
        """For the palette, beside what keys do."""
        return ()
