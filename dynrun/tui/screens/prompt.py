"""What is typed in: a line (a model, a file), or a question that is put in other words."""

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

from dynrun.tui.widgets.composer import Composer


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


class RewriteScreen(ModalScreen[str]):
    """``question``: one line; ``value``: a text of any number of lines. Gives the other text, empty for none."""

    CSS_PATH = "prompt.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss('')", "Cancel", id="rewrite.cancel")]

    def __init__(self, question: str, value: str) -> None:
        super().__init__()
        self._question, self._value = question, value

    def compose(self) -> ComposeResult:
        with Vertical(id="prompt"):
            yield Static(self._question, markup=False)
            yield Composer()

    def on_mount(self) -> None:
        composer = self.query_one(Composer)
        composer.text = self._value
        composer.move_cursor(composer.document.end)
        composer.focus()

    @on(Composer.Pasted)
    def _pasted(self, message: Composer.Pasted) -> None:
        """Nothing is attached here: it goes where the cursor is."""
        self.query_one(Composer).insert(message.attachment.text)

    @on(Composer.Sent)
    def _sent(self, message: Composer.Sent) -> None:
        self.dismiss(message.text.strip())
