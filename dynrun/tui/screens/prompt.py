"""A line to type in: a model, a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.suggester import SuggestFromList
from textual.widgets import Input, Static


class PromptScreen(ModalScreen[str]):
    """``question``: one line; ``known``: what is offered while one types. Gives the text, empty for none."""

    CSS_PATH = "prompt.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss('')", "Cancel", id="prompt.cancel")]

    def __init__(self, question: str, known: Sequence[str] = (), value: str = "") -> None:
        super().__init__()
        self._question, self._known, self._value = question, known, value

    def compose(self) -> ComposeResult:
        with Vertical(id="prompt"):
            yield Static(self._question, markup=False)
            yield Input(self._value, suggester=SuggestFromList(self._known, case_sensitive=False), compact=True)

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        self.dismiss(event.value.strip())
