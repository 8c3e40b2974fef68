"""What every room of the app is: a screen with the header of rooms, its body and the footer of keys."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from textual import messages
from textual.app import ComposeResult, SystemCommand
from textual.dom import DOMNode
from textual.geometry import Size
from textual.screen import Screen
from textual.widget import Widget

from dynrun.tui.cycles import LeanCompositor
from dynrun.tui.widgets.key_footer import KeyFooter
from dynrun.tui.widgets.room_header import RoomHeader

if TYPE_CHECKING:
    from dynrun.tui.app import DynrunApp
    from dynrun.tui.messages import Visit

# For so many times as long as the last layout took no other is made.
_REST, _LONGEST_REST_S = 2.0, 0.1


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
        self._compositor = LeanCompositor()
        self._layout_due_s = 0.0

    @property
    def dynrun(self) -> DynrunApp:
        """The app, as its own type."""
        from dynrun.tui.app import DynrunApp

        assert isinstance(self.app, DynrunApp)
        return self.app

    def compose(self) -> ComposeResult:
        yield RoomHeader(self.MODE)
        yield from self.body()
        yield KeyFooter()

    # Drawing: laying out what grows takes a third of the time at most; keys are shown in the rest

    def _refresh_layout(self, size: Size | None = None, scroll: bool = False) -> None:
        began = time.perf_counter()
        super()._refresh_layout(size, scroll)
        ended = time.perf_counter()
        self._layout_due_s = ended + min(_REST * (ended - began), _LONGEST_REST_S)

    async def _on_update(self, message: messages.Update) -> None:
        """A widget is to be drawn. Keys do not wait for the next time that everything is."""
        keyed = message.widget
        if self.is_current and keyed is self.focused and (self.app._batch_count or self._layout_required):
            message.stop()
            message.prevent_default()
            self._show_keys(keyed)

    def _on_timer_update(self) -> None:
        """Called sixty times a second while there is something to draw."""
        keyed, batch = self.focused, self.app._batch_count
        if self.is_current and keyed in self._dirty_widgets and keyed and (batch or self._layout_required):
            self._show_keys(keyed)
        elif not (self.is_current and self._layout_required and time.perf_counter() < self._layout_due_s):
            super()._on_timer_update()
            if batch:
                # Textual would wait for the end of it, with keys too.
                self._update_timer.resume()

    def _show_keys(self, keyed: Widget) -> None:
        """Draw what has the focus, where it was; the rest stays to be drawn, and a batch goes on holding that back."""
        rest, batch = self._dirty_widgets - {keyed}, self.app._batch_count
        self._compositor.update_widgets({keyed})
        self.app._batch_count = 0
        self._compositor_refresh()
        self.app._batch_count = batch
        self._dirty_widgets.update(rest)

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
