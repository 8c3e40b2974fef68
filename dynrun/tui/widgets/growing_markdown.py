"""Markdown that grows while a model speaks, in pieces of bounded length, so that a long answer costs no more at its end
than at its beginning."""

from __future__ import annotations

import re
from collections.abc import Iterator

from textual.app import ComposeResult
from textual.containers import Vertical

from dynrun.tui.widgets.markdown_piece import MarkdownPiece

# While it grows, all of a piece is drawn anew for each word: shorter ones.
_PIECE, _GROWING = 1_500, 800
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")


def cut(text: str, opener: str = "") -> tuple[int, str]:
    """Where ``text`` may be cut in two documents that look as one, and the line that opens a fence again behind it.

    Behind the last empty line outside of any fence and before no indented line; where there is none but the text ends
    in a fence, behind its last whole line. 0 where there is no such place. ``opener``: of the fence it begins in.
    """
    best, fence, at = 0, _mark(opener), 0
    for line in text.splitlines(keepends=True):
        end = at + len(line)
        if not line.strip() and not fence and end < len(text) and not text[end].isspace():
            best = end
        if mark := _mark(line):
            if not fence:
                fence, opener = mark, line
            elif line.strip().startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        at = end
    if best:
        return best, ""
    inside = text.rfind("\n", 0, len(text) - 1) + 1
    # One that is indented belongs to a list, which the second document would not have.
    return (inside, opener) if fence and inside > len(opener) and not opener.startswith(" ") else (0, "")


def _mark(line: str) -> str:
    match = _FENCE.match(line)
    return match[1] if match else ""


def parts(text: str) -> Iterator[tuple[str, str]]:
    """``text`` in parts, each with the opener of the fence that it begins in."""
    opener = ""
    while len(text) > 2 * _PIECE:
        end, after = cut(text[: 2 * _PIECE], opener)
        if not end:
            break
        yield text[:end], opener
        text, opener = text[end:], after
    yield text, opener


class GrowingMarkdown(Vertical):
    """Several pieces, one below the other, that read as one document. What it is given at first sleeps."""

    DEFAULT_CSS = """
    GrowingMarkdown { height: auto; }
    """

    def __init__(self, text: str = "", *, id: str | None = None) -> None:  # noqa: A002 (as Textual calls it)
        super().__init__(id=id)
        self._given = text

    def compose(self) -> ComposeResult:
        given = list(parts(self._given))
        openers = [opener for _, opener in given[1:]] + [""]
        for (text, opener), following in zip(given, openers, strict=True):
            yield MarkdownPiece(text, opener, ends_in_fence=bool(following), asleep=bool(text))

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(piece.text for piece in self.query(MarkdownPiece))

    @property
    def _last(self) -> MarkdownPiece:
        return self.query(MarkdownPiece).last()

    async def grow(self, text: str) -> None:
        """More of it."""
        if not text:
            return
        last = self._last
        if len(last.text) > _GROWING:
            end, opener = cut(last.text, last.opener)
            if end:
                rest = last.text[end:]
                await last.settle(last.text[:end], ends_in_fence=bool(opener))
                last = MarkdownPiece(rest, opener)
                await self.mount(last)
        await last.grow(text)

    async def clear(self) -> None:
        """Begin again."""
        await self.remove_children()
        await self.mount(MarkdownPiece())

    async def finish(self) -> None:
        """No more comes."""
        await self._last.settle(self._last.text)
