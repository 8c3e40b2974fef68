"""One message of a conversation: a question, or an answer with its thoughts folded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import Collapsible, Static

from dynrun.runtime.history import Message
from dynrun.tui.conversing import code_blocks
from dynrun.tui.messages import Frozen
from dynrun.tui.widgets.growing_markdown import GrowingMarkdown

_STOPS = {"cancelled": "stopped", "length": "the limit of tokens was reached", "died": "the engine died here"}
# Thoughts are shown as plain text, the last part of them while they come.
_THOUGHTS_SHOWN = 20_000


class MessageView(Vertical, can_focus=True):
    """``index``: of the message in its conversation. An answer that is being given grows (:meth:`grow`)."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("e", "want('edit')", "Edit, branch", id="message.edit"),
        Binding("r", "want('again')", "Again", id="message.again"),
        Binding("y", "copy", "Copy", id="message.copy"),
        Binding("b", "copy_code", "Copy code", id="message.copy_code"),
        Binding("t", "thoughts", "Thoughts", id="message.thoughts"),
        Binding("up,k", "app.focus_previous", "Previous", show=False, id="message.previous"),
        Binding("down,j", "app.focus_next", "Next", show=False, id="message.next"),
    ]

    @dataclass(eq=False)
    class Wanted(Frozen):
        """The user wants ``what`` (edit or again) of the message ``index``."""

        index: int
        what: str

    def __init__(self, index: int, message: Message, title: str, *, growing: bool = False) -> None:
        super().__init__(classes=f"-{message.role}")
        self.index, self.message, self._title, self._growing = index, message, title, growing
        self._thoughts: list[str] = []
        self._next_code = 0

    def compose(self) -> ComposeResult:
        yield Static(self._title, classes="who", markup=False)
        for image in self.message.images:
            yield Static(f"[image {image}]", classes="image", markup=False)
        if self.message.role == "assistant":
            with Collapsible(title="thoughts", collapsed=not self._growing, classes="thoughts"):
                yield Static(self.message.reasoning.strip()[-_THOUGHTS_SHOWN:], classes="thought", markup=False)
            yield GrowingMarkdown(self.message.text)
            yield Static(_STOPS.get(self.message.stop, ""), classes="end", markup=False)
        else:
            yield Static(self.message.text, classes="question", markup=False)

    def on_mount(self) -> None:
        for thoughts in self.query(".thoughts"):
            thoughts.display = bool(self.message.reasoning)

    async def grow(self, text: str, thought: str) -> None:
        """More of the answer."""
        if thought:
            self._thoughts.append(thought)
            box = self.query_one(Collapsible)
            box.display = True
            box.query_one(".thought", Static).update("".join(self._thoughts)[-_THOUGHTS_SHOWN:].strip())
        if text:
            if self._thoughts and not self.query_one(Collapsible).collapsed:
                # Thought enough.
                self.query_one(Collapsible).collapsed = True
            await self.query_one(GrowingMarkdown).grow(text)

    async def restart(self) -> None:
        """The answer so far is void."""
        self._thoughts.clear()
        self.query_one(Collapsible).display = False
        await self.query_one(GrowingMarkdown).clear()

    async def finish(self, message: Message, stats: str) -> None:
        """The answer is ``message``; ``stats`` goes below it."""
        self.message = message
        await self.query_one(GrowingMarkdown).finish()
        ended = _STOPS.get(message.stop, "")
        self.query_one(".end", Static).update(" · ".join(part for part in (ended, stats) if part))

    def action_want(self, what: str) -> None:
        self.post_message(self.Wanted(self.index, what))

    def action_copy(self) -> None:
        self._copy(self.message.text, "the answer" if self.message.role == "assistant" else "the question")

    def action_copy_code(self) -> None:
        """The next block of code, the first after the last."""
        blocks = code_blocks(self.message.text)
        if not blocks:
            self.notify("there is no block of code in it", timeout=2)
            return
        which = self._next_code % len(blocks)
        self._next_code += 1
        self._copy(blocks[which], f"code block {which + 1} of {len(blocks)}")

    def action_thoughts(self) -> None:
        for box in self.query(Collapsible):
            box.collapsed = not box.collapsed

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action in ("copy_code", "thoughts"):
            return self.message.role == "assistant"
        return True

    def _copy(self, text: str, what: str) -> None:
        self.app.copy_to_clipboard(text)
        self.notify(f"copied {what}, {len(text):,} characters", timeout=2)
