"""What every line of the app goes through on its way to the terminal."""

from __future__ import annotations

from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

from dynrun.runtime.printable import printable


class PrintableFilter(LineFilter):
    """Takes out control characters, which Textual hands on as they are: a model's answer, or a name in a repository,
    could steer the terminal. They take no room in Textual's reckoning either."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        if all(text.isprintable() for text, _, _ in segments):
            return segments
        return [Segment(text if control else printable(text), style, control) for text, style, control in segments]
