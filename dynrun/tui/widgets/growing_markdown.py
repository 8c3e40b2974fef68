"""Markdown that grows while a model speaks, in pieces of bounded length, so that a long answer costs no more at its end
than at its beginning."""

from __future__ import annotations

import re

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Markdown
from textual.widgets.markdown import MarkdownStream

_PIECE = 6_000
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})", re.MULTILINE)


def cut(text: str) -> int:
    """Where ``text`` may be cut in two documents that look as one: behind the last empty line outside of any fence
    and before no indented line; 0 where there is none."""
    best, fence, at = 0, "", 0
    for line in text.splitlines(keepends=True):
        if not line.strip() and not fence and not text[at + len(line) : at + len(line) + 1].isspace():
            best = at + len(line)
        if match := _FENCE.match(line):
            if not fence:
                fence = match[1]
            elif line.strip().startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        at += len(line)
    return best if best < len(text) else 0


class GrowingMarkdown(Vertical):
    """Several Markdown widgets, one below the other, that read as one document."""

    DEFAULT_CSS = """
    GrowingMarkdown { height: auto; }
    GrowingMarkdown Markdown { height: auto; padding: 0; margin: 0; background: transparent; }
    """

    def __init__(self, text: str = "", *, id: str | None = None) -> None:  # noqa: A002 (as Textual calls it)
        super().__init__(id=id)
        self._given = text
        # Of the last piece, the only one that grows.
        self._text = ""
        self._stream: MarkdownStream | None = None

    def compose(self) -> ComposeResult:
        rest = self._given
        while len(rest) > 2 * _PIECE and (end := cut(rest[: 2 * _PIECE])):
            yield Markdown(rest[:end], open_links=False)
            rest = rest[end:]
        self._text = rest
        yield Markdown(rest, open_links=False)

    @property
    def _last(self) -> Markdown:
        return self.query(Markdown).last()

    async def grow(self, text: str) -> None:
        """More of it."""
        if not text:
            return
        if len(self._text) > _PIECE and (end := cut(self._text)):
            whole, rest = self._text[:end], self._text[end:]
            await self._settle(whole)
            self._text = rest
            await self.mount(Markdown(rest, open_links=False))
        if self._stream is None:
            self._stream = Markdown.get_stream(self._last)
        self._text += text
        await self._stream.write(text)

    async def clear(self) -> None:
        """Begin again."""
        await self._end_stream()
        await self.remove_children()
        self._text = ""
        await self.mount(Markdown("", open_links=False))

    async def finish(self) -> None:
        """No more comes: what was put together line by line is laid out once more as a whole."""
        if self._stream is not None:
            await self._settle(self._text)

    async def _settle(self, text: str) -> None:
        await self._end_stream()
        await self._last.update(text)

    async def _end_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.stop()
