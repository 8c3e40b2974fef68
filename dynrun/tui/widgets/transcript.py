"""The messages of a conversation, the last ones first of all: earlier ones are laid out when they are asked for."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Button, Static

from dynrun.runtime.history import Chat, Message
from dynrun.tui.widgets.engine_card import EngineCard
from dynrun.tui.widgets.message_view import MessageView
from dynrun.tui.words import model_name

_AT_ONCE = 20


class Transcript(VerticalScroll, can_focus=False):
    """Follows what grows, until somebody scrolls up."""

    def compose(self) -> ComposeResult:
        yield Static("No model yet: Ctrl+S names one.", id="nothing", markup=False)

    async def show(self, chat: Chat) -> None:
        """``chat`` in the place of what is shown."""
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

    async def add(self, index: int, message: Message, title: str, *, growing: bool = False) -> MessageView:
        """One more message at the end."""
        await self.query("#nothing").remove()
        view = MessageView(index, message, title, growing=growing)
        await self.mount(view)
        self.anchor()
        return view

    async def add_card(self, card: EngineCard) -> None:
        """The engine failed: in the place of an answer."""
        await self.drop_cards()
        await self.mount(card)
        self.anchor()
        card.focus()

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
