"""A line below the question: the model, what its engine does, speed, and how much of the context is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from dynrun.tui.words import context, model_name

if TYPE_CHECKING:
    from dynrun.runtime.events import Answer


class ChatStatus(Widget):
    """``note`` goes before all numbers while there is one."""

    title: reactive[str] = reactive("")
    note: reactive[str] = reactive("")
    speed: reactive[float] = reactive(0.0)
    n_used: reactive[int] = reactive(0)
    n_ctx: reactive[int] = reactive(0)

    def __init__(self, *, id: str) -> None:  # noqa: A002 (as Textual calls it)
        super().__init__(id=id)
        self._before = 0

    def reset(self) -> None:
        """Another engine."""
        self.note, self.speed, self.n_used, self.n_ctx, self._before = "", 0.0, 0, 0, 0

    def begin(self, model: str) -> None:
        """Another conversation: how much of the context it takes is known after its next answer."""
        self.title, self.speed, self.n_used, self._before = model, 0.0, 0, 0

    def growing(self, n_tokens: int, n_per_second: float) -> None:
        """So many tokens of an answer have come."""
        self.note, self.speed, self.n_used = "", n_per_second, self._before + n_tokens

    def ended(self, answer: Answer) -> None:
        """What llama-server says when it is over."""
        timings = answer.timings
        if timings.predicted_n:
            self._before = self.n_used = timings.cache_n + timings.prompt_n + timings.predicted_n
            self.speed = timings.predicted_per_second
        self.note = ""

    def render(self) -> Text:
        parts = [model_name(self.title) or "no model"]
        if self.note:
            parts.append(self.note)
        elif self.speed:
            parts.append(f"{self.speed:.1f} tokens/s")
        if self.n_ctx:
            parts.append(f"context {self.n_used:,} of {context(self.n_ctx)} ({self.n_used / self.n_ctx:.0%})")
        return Text(" · ".join(parts), no_wrap=True, overflow="ellipsis")
