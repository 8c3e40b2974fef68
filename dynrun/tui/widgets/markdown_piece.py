"""A part of a Markdown document, of bounded length. Far from the screen it is an empty box of its height: the time that
the layout of a conversation takes grows with the number of widgets in it, whether they can be seen or not."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from rich.cells import cell_len
from textual import events
from textual.containers import Vertical
from textual.widgets.markdown import MarkdownStream

from dynrun.tui.cycles import forget_children
from dynrun.tui.messages import Frozen
from dynrun.tui.widgets.document import Document, load_lexers


class MarkdownPiece(Vertical):
    """``text`` is its part of the document; ``opener``: the line that opened the fence in which it begins.

    ``asleep``: without widgets, as high as it was, or as it is thought to be.
    """

    DEFAULT_CSS = """
    MarkdownPiece {
        height: auto;

        Document { height: auto; padding: 0; margin: 0; background: transparent; }
        &.-begins-in-fence MarkdownFence:first-child { margin: 0 0 1 0; & > Label { padding: 0 2 1 2; } }
        &.-ends-in-fence MarkdownFence:last-child { margin: 1 0 0 0; & > Label { padding: 1 2 0 2; } }
        &.-begins-in-fence.-ends-in-fence MarkdownFence:first-child:last-child {
            margin: 0;
            & > Label { padding: 0 2; }
        }
    }
    """

    @dataclass(eq=False)
    class Fitted(Frozen):
        """It woke, and is higher by so many ``lines`` than it was asleep."""

        piece: MarkdownPiece
        lines: int

    @dataclass(eq=False)
    class Placed(Frozen):
        """It is asleep and has got its place on the screen: whether it is far from what is seen can be told now."""

    def __init__(self, text: str = "", opener: str = "", *, ends_in_fence: bool = False, asleep: bool = False) -> None:
        super().__init__()
        self.text, self.opener, self.asleep = text, opener, asleep
        # Its document is put in, or taken away, by one at a time: what grows it, and what looks at what is near.
        self._changing = asyncio.Lock()
        # In which it was as high as it is asleep.
        self._width = 0
        self._growing = False
        self._stream: MarkdownStream | None = None
        self.set_class(bool(opener), "-begins-in-fence")
        self.set_class(ends_in_fence, "-ends-in-fence")

    def on_resize(self, event: events.Resize) -> None:
        if self.asleep and event.size.width != self._width:
            self._width = event.size.width
            self.styles.height = self._guess(event.size.width)
            self.post_message(self.Placed())

    # While it grows

    async def grow(self, text: str) -> None:
        """More of it. One that has grown does not sleep until it is settled."""
        async with self._changing:
            self._growing = True
            await load_lexers(self.text.rpartition("\n")[2] + text)
            if self._stream is None:
                self._get_up()
                # Textual goes on with a document that it was given whole as if its last line were a block of its own.
                await self.remove_children()
                document = Document()
                await self.mount(document)
                self._stream = Document.get_stream(document)
                await self._stream.write(self.opener + self.text)
            self.text += text
            await self._stream.write(text)

    async def settle(self, text: str, *, ends_in_fence: bool = False) -> None:
        """It is ``text`` and grows no more: what was put together line by line is laid out once more as a whole."""
        async with self._changing:
            self.text = text
            self.set_class(ends_in_fence, "-ends-in-fence")
            if self._stream is not None:
                await self._stream.stop()
                await self.query_one(Document).update(self.opener + text)
            self._stream, self._growing = None, False

    # Sleep

    async def wake(self) -> None:
        """Be drawn again; posts Fitted when it is as high as what it draws."""
        async with self._changing:
            if not self.asleep:
                return
            self.asleep = False
            await load_lexers(self.opener + self.text)
            document = Document()
            await self.mount(document)
            await document.update(self.opener + self.text)
            self.call_after_refresh(self._fit)

    def _fit(self) -> None:
        if self.asleep or not self.is_mounted:
            return
        lines = sum(child.outer_size.height for child in self.children) - self.size.height
        self._get_up()
        self.post_message(self.Fitted(self, lines))

    def _get_up(self) -> None:
        self.asleep = False
        self.styles.height = "auto"

    async def doze(self) -> None:
        """Be an empty box; not while it grows."""
        async with self._changing:
            if self.asleep or self._growing:
                return
            self.asleep, self._width = True, self.size.width
            self.styles.height = self.size.height
            await self.remove_children()
            forget_children(self)

    def _guess(self, width: int) -> int:
        """Lines that it will have in ``width`` cells, about."""
        return sum(max(1, -(-cell_len(line) // max(width, 1))) for line in self.text.splitlines()) or 1
