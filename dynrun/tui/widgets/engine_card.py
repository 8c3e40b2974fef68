"""What is shown where an answer should be and the engine died: the cause, its last lines, and what one key will do."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import Static

from dynrun.tui.chatting import EngineFailed


class EngineCard(Vertical, can_focus=True):
    """Posts Retry."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter,r", "retry", "Start again and ask again", id="card.retry")]
    DEFAULT_CSS = """
    EngineCard {
        height: auto;
        border: round $error;
        border-title-color: $error;
        padding: 0 1;
        margin: 1 0;

        &:focus { border: heavy $error; }
        .lines { color: $text-muted; }
    }
    """

    class Retry(Message):
        """The user pressed the key."""

    def __init__(self, failed: EngineFailed) -> None:
        super().__init__()
        self._failed = failed
        self.border_title = "the engine failed"

    def compose(self) -> ComposeResult:
        told = self._failed
        yield Static(f"{told.reason}{f' — {told.fix}' if told.fix else ''}", classes="cause", markup=False)
        if told.lines:
            yield Static("\n".join(told.lines), classes="lines", markup=False)
        if told.log is not None:
            yield Static(f"log: {told.log}", classes="log", markup=False)
        yield Static("Nothing is lost. Enter starts the engine again and asks again.", classes="next", markup=False)

    def action_retry(self) -> None:
        self.post_message(self.Retry())
