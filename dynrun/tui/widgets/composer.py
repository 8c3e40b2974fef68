"""Where a question is typed: Enter sends, Shift+Enter and Ctrl+J make a new line; a long paste is attached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message as TextualMessage
from textual.widgets import TextArea

from dynrun.tui.conversing import Attachment
from dynrun.tui.messages import Frozen

_LONG_PASTE = 2_000


class Composer(TextArea):
    """Posts Sent; Pasted for what is too long to be looked at there; Emptied for a backspace where nothing is."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "send", "Send", id="composer.send", priority=True),
        Binding("shift+enter,ctrl+j", "newline", "New line", show=False, id="composer.newline", priority=True),
    ]

    @dataclass(eq=False)
    class Sent(Frozen):
        """The user wants ``text`` answered."""

        text: str

    @dataclass(eq=False)
    class Pasted(Frozen):
        """A long text was pasted."""

        attachment: Attachment

    @dataclass(eq=False)
    class Turn(Frozen, bubble=False):
        """All that was typed before Enter is here now; ``newline``: of Shift+Enter."""

        newline: bool

    class Emptied(TextualMessage):
        """Backspace where there is no text."""

    class Up(TextualMessage):
        """The cursor wants to leave upwards."""

    def __init__(self) -> None:
        super().__init__(id="composer", soft_wrap=True, show_line_numbers=False, tab_behavior="focus")
        self.placeholder = "Ask something. Enter sends, Shift+Enter or Ctrl+J makes a new line."

    # Bindings with priority run before letters that were typed earlier have come here: both wait for their turn.

    def action_send(self) -> None:
        self.post_message(self.Turn(newline=False))

    def action_newline(self) -> None:
        self.post_message(self.Turn(newline=True))

    def on_composer_turn(self, message: Turn) -> None:
        if message.newline:
            self.insert("\n")
        else:
            self.post_message(self.Sent(self.text))

    def taken(self, text: str) -> None:
        """``text`` was sent: what was typed behind it meanwhile stays."""
        self.text = self.text.removeprefix(text)
        self.move_cursor(self.document.end)

    async def _on_paste(self, event: events.Paste) -> None:
        # What is short is TextArea's own handler's, which Textual calls next.
        if len(event.text) > _LONG_PASTE:
            event.prevent_default()
            event.stop()
            self.post_message(self.Pasted(Attachment("pasted text", event.text)))

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "backspace" and not self.text:
            self.post_message(self.Emptied())
        if event.key == "up" and self.cursor_location[0] == 0:
            event.prevent_default()
            event.stop()
            self.post_message(self.Up())
