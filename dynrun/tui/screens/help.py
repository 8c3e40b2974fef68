"""Help for the screen below: what it is for, and every key with the id under which config.toml can change it."""

from __future__ import annotations

from typing import Any, ClassVar

from rich.table import Table
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widgets import Markdown, Static

from dynrun.paths import config_file


class HelpScreen(ModalScreen[None]):
    """``below``: the screen that is explained."""

    CSS_PATH = "help.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f1,question_mark,q", "dismiss", "Close", id="help.close"),
    ]

    def __init__(self, below: Screen[Any]) -> None:
        super().__init__()
        self._below = below

    def compose(self) -> ComposeResult:
        with Vertical(id="help"), VerticalScroll():
            yield Markdown(getattr(self._below, "HELP", "").strip())
            yield Static(_keys(self._below), id="keys")
            yield Static(f'Change keys in {config_file()}:  [tui.keys]  "id" = "key"', id="how", markup=False)

    def on_mount(self) -> None:
        self.query_one("#help").border_title = "Help"
        self.query_one("#help").border_subtitle = "Esc closes"
        self.set_focus(self.query_one(VerticalScroll))


def _keys(screen: Screen[Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("key", no_wrap=True, style="bold")
    table.add_column("does")
    table.add_column("id", style="dim", no_wrap=True)
    keys: dict[tuple[str, str], list[str]] = {}
    for _, binding, _, _ in screen.active_bindings.values():
        # Those without an id are Textual's own, as in every list and text field.
        if binding.description and binding.id:
            shown = screen.app.get_key_display(Binding(binding.key, binding.action))
            keys.setdefault((binding.description, binding.id or ""), []).append(shown)
    # The screen's own first: the app's are the same everywhere.
    for (does, name), pressed in sorted(keys.items(), key=lambda item: item[0][1].startswith("app.")):
        table.add_row(" ".join(dict.fromkeys(pressed)), does, name)
    return table
