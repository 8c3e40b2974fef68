"""The messages of a conversation, the last ones first of all: earlier ones are laid out when they are asked for."""

from __future__ import annotations

from typing import Any

from textual import on
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.geometry import NULL_REGION, Size
from textual.screen import Screen
from textual.widgets import Button, Static
from textual.worker import Worker

from dynrun.runtime.history import Chat, Message
from dynrun.tui.collector import COLLECTOR
from dynrun.tui.jobs import running
from dynrun.tui.widgets.engine_card import EngineCard
from dynrun.tui.widgets.markdown_piece import MarkdownPiece
from dynrun.tui.widgets.message_view import MessageView
from dynrun.tui.words import model_name

_AT_ONCE = 20
_REST = "chat.rest"


class Transcript(VerticalScroll, can_focus=False):
    """Follows what grows, until somebody scrolls up. What is far from the screen sleeps (markdown_piece.py)."""

    def __init__(self, *, id: str) -> None:  # noqa: A002 (as Textual calls it)
        super().__init__(id=id)
        # Whether what is near the screen may be other things than at the last look.
        self._changed = False
        # How far it was scrolled, and how large it and all in it were, when all was last laid out.
        self._laid_out: tuple[float, Size, Size] | None = None

    def compose(self) -> ComposeResult:
        yield Static("No model yet: Ctrl+S names one.", id="nothing", markup=False)

    def on_mount(self) -> None:
        # Not when it is told to scroll, nor "after refresh", which may come before: where everything is must be known.
        self.screen.screen_layout_refresh_signal.subscribe(self, self._see, immediate=True)

    def _size_updated(self, size: Size, virtual_size: Size, container_size: Size, layout: bool = True) -> bool:
        """All in it was just laid out: Textual would lay out everything again, for each piece of an answer."""
        return super()._size_updated(size, virtual_size, container_size, layout=False)

    def _see(self, _screen: Screen[Any]) -> None:
        if self._laid_out != (laid_out := (self.scroll_y, self.virtual_size, self.size)):
            self._laid_out = laid_out
            self.call_next(self._look)

    @on(MarkdownPiece.Placed)
    def _place(self) -> None:
        # Its height is only thought of now, and moves what is below it: again when that is laid out.
        self._laid_out = None
        self._look()

    def _look(self) -> None:
        self._changed = True
        if not running(self, _REST):
            _: Worker[None] = self.run_worker(self._wake_what_is_near, group=_REST)

    async def _wake_what_is_near(self) -> None:
        """The rest falls asleep."""
        while self._changed:
            self._changed = False
            near = self.region.grow((self.size.height // 2, 0, self.size.height // 2, 0))
            for piece in self.query(MarkdownPiece):
                # One that was not laid out yet is neither near nor far.
                if (place := piece.region) != NULL_REGION:
                    await (piece.wake() if place.overlaps(near) else piece.doze())

    @on(MarkdownPiece.Fitted)
    def _keep_place(self, message: MarkdownPiece.Fitted) -> None:
        """What is read stays where it is, whatever wakes above it."""
        if message.piece.region.y < self.region.y and not self.is_vertical_scroll_end:
            self.scroll_to(y=self.scroll_y + message.lines, animate=False, release_anchor=False)

    async def show(self, chat: Chat) -> None:
        """``chat`` in the place of what is shown."""
        self.workers.cancel_group(self, _REST)
        COLLECTOR.release()
        async with self.batch():
            await self.remove_children()
            if not chat.messages:
                hint = f"{model_name(chat.model)} listens." if chat.model else "No model yet: Ctrl+S names one."
                await self.mount(Static(hint, id="nothing", markup=False))
            await self._show_from(chat, max(len(chat.messages) - _AT_ONCE, 0))
        self.anchor()

    async def _show_from(self, chat: Chat, first: int) -> None:
        views = [_view(chat, index) for index in range(first, len(chat.messages))]
        earlier = [Earlier(chat, first)] if first else []
        await self.mount_all([*earlier, *views])

    async def add(self, index: int, message: Message, title: str) -> MessageView:
        """One more message at the end."""
        await self.query("#nothing").remove()
        view = MessageView(index, message, title)
        await self.mount(view)
        self.anchor()
        COLLECTOR.settle()
        return view

    async def add_card(self, card: EngineCard) -> None:
        """The engine failed: in the place of an answer."""
        await self.drop_cards()
        await self.mount(card)
        self.anchor()
        # To scroll to where it is before it is laid out would let go of the end.
        card.focus(scroll_visible=False)

    async def drop_cards(self) -> None:
        await self.query(EngineCard).remove()

    @on(Button.Pressed)
    async def _earlier(self, event: Button.Pressed) -> None:
        event.stop()
        button = event.button
        assert isinstance(button, Earlier)
        first = max(button.first - _AT_ONCE, 0)
        views = [_view(button.chat, index) for index in range(first, button.first)]
        earlier = [Earlier(button.chat, first)] if first else []
        async with self.batch():
            await self.mount_all([*earlier, *views], before=button)
            await button.remove()
        (views[-1] if views else self).scroll_visible(animate=False)


class Earlier(Button):
    """Shows the messages before ``first``."""

    def __init__(self, chat: Chat, first: int) -> None:
        super().__init__(f"{first} earlier messages", compact=True)
        self.chat, self.first = chat, first


def _view(chat: Chat, index: int) -> MessageView:
    message = chat.messages[index]
    return MessageView(index, message, "you" if message.role == "user" else model_name(chat.model))
