"""The stages of a `make`, one a line: what is done, what runs and how far it is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

from rich.text import Text
from textual.geometry import Size
from textual.widget import Widget

from dynrun.tui.words import duration

_NAME, _BAR = 13, 16


@dataclass
class _Stage:
    name: str
    detail: str
    began_s: float
    part: float = 0.0
    note: str = ""
    ended_s: float | None = None


class StageList(Widget):
    """Grows downwards; the last stage is the one that runs, until :meth:`end`."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"stages--done", "stages--running", "stages--quiet", "stages--failed"}
    DEFAULT_CSS = """
    StageList {
        height: auto;
        text-wrap: nowrap;
        text-overflow: ellipsis;
        .stages--done { color: $success; }
        .stages--running { color: $primary; }
        .stages--failed { color: $error; }
        .stages--quiet { text-style: dim; }
    }
    """

    def __init__(self, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._stages: list[_Stage] = []
        self._ending = ""

    def clear(self) -> None:
        """Nothing has begun."""
        self._stages, self._ending = [], ""
        self.refresh(layout=True)

    def begin(self, name: str, detail: str) -> None:
        """The stage before is done. Notes of the one that runs are told as its own."""
        now = time.monotonic()
        if self._stages and self._stages[-1].name == name:
            self._stages[-1].detail = detail
        else:
            self._finish(now)
            self._stages.append(_Stage(name, detail, now))
        self.refresh(layout=True)

    def move(self, done: float, total: float, note: str) -> None:
        """Of the stage that runs."""
        if self._stages:
            self._stages[-1].part = done / total if total else 0.0
            self._stages[-1].note = note
            self.refresh()

    def end(self, ending: str = "") -> None:
        """Nothing runs any more; ``ending`` says why, where it is not because all is done."""
        self._ending = ending
        self._finish(time.monotonic())
        self.refresh(layout=True)

    def _finish(self, now: float) -> None:
        if self._stages and self._stages[-1].ended_s is None:
            self._stages[-1].ended_s = now

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return len(self._stages)

    def render(self) -> Text:
        text = Text(no_wrap=True, overflow="ellipsis")
        for i, stage in enumerate(self._stages):
            last = i == len(self._stages) - 1
            text.append("\n" if i else "")
            self._line(text, stage, ending=self._ending if last else "")
        return text

    def _line(self, text: Text, stage: _Stage, ending: str) -> None:
        style = self.get_component_rich_style
        spent = duration((stage.ended_s or time.monotonic()) - stage.began_s)
        if ending:
            text.append(f"✗ {stage.name:{_NAME}}", style("stages--failed", partial=True))
            text.append(f"{spent:>7}  {ending}")
        elif stage.ended_s is not None:
            text.append(f"✓ {stage.name:{_NAME}}", style("stages--done", partial=True))
            text.append(f"{spent:>7}  {stage.detail}", style("stages--quiet", partial=True))
        else:
            filled = round(stage.part * _BAR)
            text.append(f"▸ {stage.name:{_NAME}}{spent:>7}  ", style("stages--running", partial=True))
            text.append("━" * filled, style("stages--running", partial=True))
            text.append("─" * (_BAR - filled), style("stages--quiet", partial=True))
            text.append(f" {stage.part:4.0%}  {stage.note or stage.detail}")
