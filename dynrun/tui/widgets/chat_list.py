"""The conversations that were kept, the latest first, found by what was said in them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import Input, OptionList
from textual.widgets.option_list import Option

from dynrun.runtime.history import Chat
from dynrun.tui.conversing import matching
from dynrun.tui.messages import Frozen
from dynrun.tui.words import age, model_name


class ChatList(Vertical):
    """Posts Chosen; Unwanted for one to be deleted."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("delete", "delete", "Delete chat", id="chats.delete"),
        Binding("escape", "screen.chats", "Close", show=False, id="chats.close"),
    ]

    @dataclass(eq=False)
    class Chosen(Frozen):
        """The user wants to go on with ``chat``."""

        chat: Chat

    @dataclass(eq=False)
    class Unwanted(Frozen):
        """The user wants ``chat`` gone."""

        chat: Chat

    def __init__(self, *, id: str) -> None:  # noqa: A002 (as Textual calls it)
        super().__init__(id=id)
        self._all: Sequence[Chat] = ()
        self._shown: list[Chat] = []

    def compose(self) -> ComposeResult:
        yield Input(placeholder="search what was said", compact=True, id="chat-search")
        yield OptionList(id="chat-options", compact=True, markup=False)

    def show(self, chats: Sequence[Chat]) -> None:
        """These, of which the search takes some."""
        self._all = chats
        self._filter()

    @on(Input.Changed, "#chat-search")
    def _filter(self) -> None:
        self._shown = matching(self._all, self.query_one(Input).value)
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options(Option(_line(chat)) for chat in self._shown)
        if self._shown:
            options.highlighted = 0

    @on(Input.Submitted, "#chat-search")
    def _to_the_list(self) -> None:
        self.query_one(OptionList).focus()

    @on(OptionList.OptionSelected)
    def _chosen(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.post_message(self.Chosen(self._shown[event.option_index]))

    def action_delete(self) -> None:
        at = self.query_one(OptionList).highlighted
        if at is not None and at < len(self._shown):
            self.post_message(self.Unwanted(self._shown[at]))


def _line(chat: Chat) -> Text:
    when = age(max(time.time() - chat.updated_s, 0))
    return Text.assemble((f"{when:>6} ", "dim"), chat.title or "empty", (f"  {model_name(chat.model)}", "dim"))
