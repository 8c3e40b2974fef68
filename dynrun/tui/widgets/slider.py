"""A slider over given steps: arrows, Page Up and Down, Home and End, a click, or dragging."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.reactive import reactive
from textual.widget import Widget

from dynrun.tui.messages import Frozen


class Slider(Widget, can_focus=True):
    """One line, or two where there are ``marks``.

    ``steps``: the values in order, at least one; ``shown``: a value as people read it; ``marks``: labels under steps by
    their index; those for which there is no room are left out. ``label_width``: cells of the label, to align several.
    """

    ALLOW_SELECT = False
    COMPONENT_CLASSES: ClassVar[set[str]] = {"slider--label", "slider--track", "slider--fill", "slider--knob"}
    DEFAULT_CSS = """
    Slider {
        height: auto;
        width: 1fr;
        pointer: pointer;

        .slider--label { text-style: dim; }
        .slider--track { color: $border; }
        .slider--fill { color: $primary; }
        .slider--knob { color: $primary; text-style: bold; }

        &:focus .slider--label { color: $accent; text-style: bold; }
        &:focus .slider--knob { color: $accent; }
        &:disabled { opacity: 50%; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "move(-1)", "Less", show=False, id="slider.less"),
        Binding("right,l", "move(1)", "More", show=False, id="slider.more"),
        Binding("pageup", "leap(-1)", "Much less", show=False, id="slider.much_less"),
        Binding("pagedown", "leap(1)", "Much more", show=False, id="slider.much_more"),
        Binding("home", "end(0)", "Least", show=False, id="slider.least"),
        Binding("end", "end(1)", "Most", show=False, id="slider.most"),
    ]

    index: reactive[int] = reactive(0)

    @dataclass(eq=False)
    class Changed(Frozen):
        """The user moved ``slider``, or its value was set, to ``value``."""

        slider: Slider
        value: Any

        @property
        def control(self) -> Slider:
            return self.slider

    def __init__(
        self,
        label: str,
        steps: Sequence[Any],
        *,
        value: Any = None,
        shown: Callable[[Any], str] = str,
        marks: Mapping[int, str] | None = None,
        label_width: int = 0,
        id: str | None = None,  # noqa: A002
    ) -> None:
        super().__init__(id=id)
        self.label, self._shown, self._label_width = label, shown, max(label_width, len(label) + 1)
        self._steps, self._marks = list(steps), dict(marks or {})
        self.set_reactive(Slider.index, self._nearest(value))

    @property
    def value(self) -> Any:
        """The step under the knob."""
        return self._steps[self.index]

    @property
    def steps(self) -> list[Any]:
        return list(self._steps)

    def set_steps(self, steps: Sequence[Any], value: Any = None, marks: Mapping[int, str] | None = None) -> None:
        """Other steps, and where the knob stands among them (at the first where ``value`` is none). Tells nobody."""
        self._steps, self._marks = list(steps), dict(marks or {})
        with self.prevent(Slider.Changed):
            self.index = self._nearest(value)
        self.refresh(layout=True)

    def set_value(self, value: Any) -> None:
        """The knob to the step next to ``value``, telling nobody."""
        with self.prevent(Slider.Changed):
            self.index = self._nearest(value)

    def _nearest(self, value: Any) -> int:
        if value is None:
            return 0
        if value in self._steps:
            return self._steps.index(value)
        return min(range(len(self._steps)), key=lambda i: abs(float(self._steps[i]) - float(value)))

    def validate_index(self, index: int) -> int:
        return max(0, min(index, len(self._steps) - 1))

    def watch_index(self, before: int, after: int) -> None:
        if before != after and self.is_mounted:
            self.post_message(self.Changed(self, self._steps[after]))

    def action_move(self, steps: int) -> None:
        self.index += steps

    def action_leap(self, direction: int) -> None:
        self.index += direction * max(1, len(self._steps) // 8)

    def action_end(self, last: int) -> None:
        self.index = len(self._steps) - 1 if last else 0

    # The mouse

    def on_mouse_down(self, event: events.MouseDown) -> None:
        self.capture_mouse()
        self._to_cell(event.x)

    def on_mouse_move(self, event: events.MouseMove) -> None:
        if self.app.mouse_captured is self:
            self._to_cell(event.x)

    def on_mouse_up(self) -> None:
        self.release_mouse()

    def _to_cell(self, x: int) -> None:
        left, width = self._track()
        self.index = round((x - left) / max(width - 1, 1) * (len(self._steps) - 1))

    # What is shown

    def _track(self) -> tuple[int, int]:
        """Column and width of the track; the value stands right of it."""
        widest = max(len(self._shown(step)) for step in (self._steps[0], self._steps[-1], self.value))
        return self._label_width, max(self.content_size.width - self._label_width - widest - 1, 4)

    def _cell(self, index: int) -> int:
        _, width = self._track()
        return round(index / max(len(self._steps) - 1, 1) * (width - 1))

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return 2 if self._marks else 1

    def render(self) -> Text:
        left, width = self._track()
        at = self._cell(self.index)
        style = self.get_component_rich_style
        text = Text(no_wrap=True, overflow="crop")
        text.append(self.label.ljust(left)[:left], style("slider--label", partial=True))
        text.append("━" * at, style("slider--fill", partial=True))
        text.append("●", style("slider--knob", partial=True))
        text.append("─" * (width - at - 1), style("slider--track", partial=True))
        text.append(f" {self._shown(self.value)}")
        if self._marks:
            text.append("\n" + " " * left + self._mark_line(width), style("slider--label", partial=True))
        return text

    def _mark_line(self, width: int) -> str:
        line = ""
        for index, mark in sorted(self._marks.items()):
            start = min(self._cell(index), width - len(mark) - 1)
            if start >= len(line) + bool(line):
                line = line.ljust(start) + f"╵{mark}"
        return line
