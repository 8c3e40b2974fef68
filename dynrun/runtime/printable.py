"""Text of strangers — models, repositories, files — for a terminal."""

from __future__ import annotations

_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def printable(text: str) -> str:
    """``text`` without control characters: escape sequences in it must not reach the terminal."""
    return text.translate(_CONTROLS)
