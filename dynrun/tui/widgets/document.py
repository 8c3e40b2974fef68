"""Markdown as Textual draws it, but for blocks of code: the event loop waits for no lexer.

Textual would import a lexer's module while it draws, all of Pygments' five hundred where a block names no language, and
would look through the installed packages for a language that nobody knows.
"""

from __future__ import annotations

import asyncio
import re
from functools import cache

from markdown_it import MarkdownIt
from textual.content import Content
from textual.widgets import Markdown
from textual.widgets.markdown import MarkdownFence

_LANGUAGE = re.compile(r"^ *(?:`{3,}|~{3,}) *([\w+#.-]+)", re.MULTILINE)
_PLAIN = "text"
# By what a fence says: the lexer's name.
_lexers: dict[str, str] = {}


async def load_lexers(text: str) -> None:
    """Those of the languages that fences in ``text`` name; until then such a block is plain."""
    for language in {_PLAIN, *(name.lower() for name in _LANGUAGE.findall(text))} - _lexers.keys():
        _lexers[language] = await asyncio.to_thread(_loaded, language)


def _loaded(language: str) -> str:
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        get_lexer_by_name(language)  # type: ignore[no-untyped-call]
    except ClassNotFound:
        return _PLAIN
    return language


class _Fence(MarkdownFence):
    @classmethod
    def highlight(cls, code: str, language: str, ansi: bool = False, dark: bool = False) -> Content:
        known = _lexers.get(language.split()[0].lower(), _PLAIN) if language.strip() else _PLAIN
        return super().highlight(code, known, ansi, dark)


def _parser() -> MarkdownIt:
    return MarkdownIt("gfm-like")


class Document(Markdown):
    """Call :func:`load_lexers` before it is given text."""

    BLOCKS = {**Markdown.BLOCKS, "fence": _Fence, "code_block": _Fence}  # noqa: RUF012 (as Textual does)

    def __init__(self) -> None:
        # One parser, not one for each piece of a stream; Textual parses a document once at a time.
        super().__init__("", open_links=False, parser_factory=cache(_parser))
