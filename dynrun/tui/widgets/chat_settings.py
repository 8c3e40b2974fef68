"""System prompt and sampling of a conversation: presets, and every number by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.widgets import Input, Select, Static, TextArea

from dynrun.errors import UsageError
from dynrun.runtime.sampling import Sampling, in_force
from dynrun.tui.messages import Frozen

# What people mean by these words; the model's own settings are what its metadata recommends.
PRESETS: dict[str, Sampling] = {
    "the model's own": Sampling(),
    "always the likeliest": Sampling(temperature=0.0),
    "precise": Sampling(temperature=0.3, top_p=0.9),
    "balanced": Sampling(temperature=0.7, top_p=0.95, min_p=0.05),
    "inventive": Sampling(temperature=1.1, top_k=0, top_p=1.0, min_p=0.08),
}
_NUMBERS = {
    "temperature": "temperature",
    "top_k": "top k",
    "top_p": "top p",
    "min_p": "min p",
    "repeat_penalty": "repeat penalty",
    "seed": "seed",
    "max_tokens": "most tokens",
}
_WHOLE = ("top_k", "seed", "max_tokens")


class ChatSettings(VerticalScroll, can_focus=False):
    """Posts Changed when a field is left or a preset chosen; a number that is none is said below, and not taken."""

    @dataclass(eq=False)
    class Changed(Frozen):
        """These are wanted from now on."""

        system: str
        sampling: Sampling

    def compose(self) -> ComposeResult:
        yield Static("system prompt", classes="label")
        yield TextArea(id="system", soft_wrap=True, show_line_numbers=False, tab_behavior="focus", compact=True)
        yield Static("sampling", classes="label")
        yield Select[str](((name, name) for name in PRESETS), allow_blank=False, compact=True, id="preset")
        for name, title in _NUMBERS.items():
            with Horizontal(classes="number"):
                yield Static(title, classes="label")
                yield Input(compact=True, id=f"set-{name}", type="integer" if name in _WHOLE else "number")
        yield Static("", id="settings-fault", markup=False)

    def on_mount(self) -> None:
        self.recommended({})

    def recommended(self, metadata: Mapping[str, Any]) -> None:
        """Show what is in force where a field is empty: the model's recommendation, or llama.cpp's default."""
        for setting in in_force(Sampling(), metadata):
            self.query_one(f"#set-{setting.name}", Input).placeholder = f"{setting.value:g} ({setting.origin})"
        self.query_one("#set-seed", Input).placeholder = "random"
        self.query_one("#set-max_tokens", Input).placeholder = "as many as fit"

    def show_system(self, text: str) -> None:
        """Another conversation's system prompt."""
        area = self.query_one("#system", TextArea)
        if area.text != text:
            area.text = text

    @property
    def values(self) -> tuple[str, Sampling]:
        """System prompt and sampling. Raises UsageError for a number that is none, or out of its range."""
        numbers: dict[str, float | int | None] = {}
        for name, title in _NUMBERS.items():
            text = self.query_one(f"#set-{name}", Input).value.strip()
            try:
                numbers[name] = (int(text) if name in _WHOLE else float(text)) if text else None
            except ValueError as error:
                raise UsageError(f"{title} is {text!r}", fix="give a number") from error
        return self.query_one("#system", TextArea).text, Sampling(**numbers)  # type: ignore[arg-type]

    @on(Select.Changed, "#preset")
    def _preset(self, event: Select.Changed) -> None:
        preset = PRESETS.get(str(event.value))
        if preset is None:
            return
        for name in _NUMBERS:
            value = getattr(preset, name)
            if name not in ("seed", "max_tokens"):
                self.query_one(f"#set-{name}", Input).value = "" if value is None else f"{value:g}"
        self._told()

    @on(Input.Changed)
    @on(TextArea.Changed)
    def _told(self) -> None:
        fault = self.query_one("#settings-fault", Static)
        try:
            system, sampling = self.values
        except UsageError as error:
            fault.update(str(error))
            return
        fault.update("")
        self.post_message(self.Changed(system, sampling))
