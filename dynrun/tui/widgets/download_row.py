"""One download: its name, a bar, rate and time left, and a line for its files where there are several."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.widget import Widget

from dynrun.tui.messages import Frozen
from dynrun.tui.widgets.fitted_table import shortened
from dynrun.tui.words import duration, size

if TYPE_CHECKING:
    from dynrun.hub.transfer import Progress

State = Literal["waiting", "running", "paused", "failed", "done"]
# The rate is of the last so many reports, which come ten times a second.
_REPORTS = 50
_WORDS = {"waiting": "starting", "paused": "paused; Space goes on", "done": "done"}


class DownloadRow(Widget, can_focus=True):
    """``model``: MODEL as `pull` takes it. Shows what it is told and asks for pauses; it fetches nothing."""

    ALLOW_SELECT = False
    COMPONENT_CLASSES: ClassVar[set[str]] = {"download--bar", "download--track", "download--error", "download--quiet"}
    DEFAULT_CSS = """
    DownloadRow {
        height: auto;
        padding: 0 1;
        text-wrap: nowrap;
        text-overflow: ellipsis;

        .download--bar { color: $success; }
        .download--track { color: $border; }
        .download--error { color: $error; }
        .download--quiet { text-style: dim; }

        &:focus { background: $primary 25%; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "pause", "Pause or go on", id="download.pause"),
        Binding("x", "drop", "Cancel", id="download.cancel"),
    ]

    @dataclass(eq=False)
    class Toggled(Frozen):
        """Pause it, or go on with it."""

        row: DownloadRow

    @dataclass(eq=False)
    class Dropped(Frozen):
        """Cancel it, or put it away once it is done."""

        row: DownloadRow

    def __init__(self, model: str, state: State = "waiting") -> None:
        super().__init__()
        self.model, self.state = model, state
        self.note = ""
        self.progress: Progress | None = None
        self._reports: deque[tuple[float, int]] = deque(maxlen=_REPORTS)

    def set_state(self, state: State, note: str = "") -> None:
        """``note``: why it failed."""
        self.state, self.note = state, note
        self._reports.clear()
        self.refresh(layout=True)

    def advance(self, progress: Progress) -> None:
        """As the transfer tells it."""
        lines = self._n_lines()
        self.progress, self.state = progress, "running"
        self._reports.append((time.monotonic(), progress.fetched_bytes))
        self.refresh(layout=self._n_lines() != lines)

    @property
    def done_bytes(self) -> int:
        return sum(file.done for file in self.progress.files) if self.progress else 0

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.progress.files) if self.progress else 0

    @property
    def rate(self) -> float:
        """Bytes per second over the last reports; 0 where there are none."""
        if len(self._reports) < 2:
            return 0.0
        (t0, n0), (t1, n1) = self._reports[0], self._reports[-1]
        return (n1 - n0) / max(t1 - t0, 1e-3)

    def action_pause(self) -> None:
        self.post_message(self.Toggled(self))

    def action_drop(self) -> None:
        self.post_message(self.Dropped(self))

    def on_click(self) -> None:
        self.focus()

    def _n_lines(self) -> int:
        several = self.progress is not None and len(self.progress.files) > 1 and self.state != "done"
        return 1 + several + bool(self._said())

    def _said(self) -> str:
        if self.state == "failed":
            return self.note
        return self.progress.note if self.progress and self.state == "running" else ""

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return self._n_lines()

    def render(self) -> Text:
        width = self.content_size.width
        right = f" {self._numbers()}"
        name_width = max(14, min(len(self.model), width - len(right) - 12))
        bar = max(width - name_width - len(right) - 1, 4)
        filled = round(bar * self.done_bytes / self.total_bytes) if self.total_bytes else 0
        style = self.get_component_rich_style
        text = Text(shortened(self.model, name_width).ljust(name_width) + " ", no_wrap=True, overflow="ellipsis")
        text.append("━" * filled, style("download--bar", partial=True))
        text.append("━" * (bar - filled), style("download--track", partial=True))
        text.append(right)
        if self.progress is not None and len(self.progress.files) > 1 and self.state != "done":
            text.append("\n" + self._files(), style("download--quiet", partial=True))
        if said := self._said():
            text.append(f"\n  {said}", style("download--error", partial=True))
        return text

    def _numbers(self) -> str:
        if self.state != "running" or self.progress is None:
            part = f"{self.done_bytes / self.total_bytes:4.0%}  " if self.total_bytes and self.state != "done" else ""
            return part + _WORDS.get(self.state, self.state)
        done, total, rate = self.done_bytes, self.total_bytes, self.rate
        left = duration((total - done) / rate) if rate > 0 else "–"
        return f"{done / max(total, 1):4.0%}  {size(done)} of {size(total)}  {size(rate)}/s  {left}"

    def _files(self) -> str:
        assert self.progress is not None
        parts = []
        for number, file in enumerate(self.progress.files, start=1):
            share = "✓" if file.checked else f"{file.done / max(file.size, 1):.0%}"
            parts.append(f"{number}: {share}")
        return "  files  " + "  ".join(parts)
