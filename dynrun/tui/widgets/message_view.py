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
# Thoughts are shown as plain text, the last part of them; while they come each more of them is laid out anew.
_THOUGHTS_SHOWN, _THOUGHTS_GROWING = 20_000, 2_000


class _Thoughts(Collapsible):
    """Textual's would scroll to itself when it opens or closes, and the transcript would not follow any more."""

    def _watch_collapsed(self, collapsed: bool) -> None:
        self._update_collapsed(collapsed)


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

    def __init__(self, index: int, message: Message, title: str) -> None:
        super().__init__(classes=f"-{message.role}")
        self.index, self.message, self._title = index, message, title
        self._thoughts: list[str] = []
        self._thinking = False
        self._next_code = 0

    def compose(self) -> ComposeResult:
        yield Static(self._title, classes="who", markup=False)
        for image in self.message.images:
            yield Static(f"[image {image}]", classes="image", markup=False)
        if self.message.role == "assistant":
            if self.message.reasoning:
                yield self._thought(self.message.reasoning.strip()[-_THOUGHTS_SHOWN:], collapsed=True)
            yield GrowingMarkdown(self.message.text)
            yield Static(_STOPS.get(self.message.stop, ""), classes="end", markup=False)
        else:
            yield Static(self.message.text, classes="question", markup=False)

    def _thought(self, text: str, *, collapsed: bool) -> Collapsible:
        shown = Static(text, classes="thought", markup=False)
        return _Thoughts(shown, title="thoughts", collapsed=collapsed, classes="thoughts")

    async def grow(self, text: str, thought: str) -> None:
        """More of the answer."""
        if thought:
            await self._think(thought)
        if text:
            for box in self.query(Collapsible) if self._thinking else ():
                # Thought enough.
                box.collapsed = True
            self._thinking = False
            await self.query_one(GrowingMarkdown).grow(text)

    async def _think(self, thought: str) -> None:
        self._thoughts.append(thought)
        self._thinking = True
        shown = "".join(self._thoughts)[-_THOUGHTS_GROWING:].strip()
        if boxes := self.query(Collapsible):
            boxes.first().query_one(".thought", Static).update(shown)
        else:
            await self.mount(self._thought(shown, collapsed=False), before=self.query_one(GrowingMarkdown))

    async def restart(self) -> None:
        """The answer so far is void."""
        self._thoughts.clear()
        await self.query(Collapsible).remove()
        await self.query_one(GrowingMarkdown).clear()

    async def finish(self, message: Message, stats: str) -> None:
        """The answer is ``message``; ``stats`` goes below it."""
        self.message = message
        for thought in self.query(".thought").results(Static):
            thought.update(message.reasoning.strip()[-_THOUGHTS_SHOWN:])
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
