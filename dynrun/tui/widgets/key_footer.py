"""The last line of every room: as many of its keys as can be shown whole, then help and the palette."""

from __future__ import annotations

from rich.cells import cell_len
from textual import events
from textual.app import ComposeResult
from textual.widget import Widget
from textual.widgets import Footer
from textual.widgets._footer import FooterKey

_ALWAYS = ("help", "command_palette")
# Around a key, and the line before the palette.
_SPACES, _LINE = 3, 2


class KeyFooter(Footer):
    """Textual's, which would cut the last key in the middle."""

    def compose(self) -> ComposeResult:
        keys = list(super().compose())
        room = self.screen.size.width - _LINE - sum(_width(key) for key in keys if _always(key))
        for key in keys:
            if not _always(key):
                room -= _width(key)
            if _always(key) or room >= 0:
                yield key

    def on_resize(self, _: events.Resize) -> None:
        self.call_after_refresh(self.recompose)


def _always(key: Widget) -> bool:
    return isinstance(key, FooterKey) and key.action in _ALWAYS


def _width(key: Widget) -> int:
    return cell_len(key.key_display + key.description) + _SPACES if isinstance(key, FooterKey) else 0
