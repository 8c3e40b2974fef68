"""What is drawn as a line, and not as text, can be told from what is behind it in both themes."""

from __future__ import annotations

import pytest
from textual.color import Color
from textual.theme import Theme
from textual.widget import Widget

from dynrun.tui.messages import Visit
from dynrun.tui.settings import TuiSettings
from dynrun.tui.themes import THEMES
from dynrun.tui.widgets.download_row import DownloadRow
from dynrun.tui.widgets.memory_bars import MemoryBars
from dynrun.tui.widgets.slider import Slider
from tests.tui.driving import running_app, wait_until

pytestmark = pytest.mark.tui

TRACKS: list[tuple[type[Widget], str]] = [
    (Slider, "slider--track"),
    (MemoryBars, "bars--free"),
    (DownloadRow, "download--track"),
]


def contrast(one: Color, other: Color) -> float:
    """As WCAG has it, from 1 to 21."""

    def light(color: Color) -> float:
        parts = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in color.normalized)
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    dark, bright = sorted((light(one), light(other)))
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
async def test_tracks_can_be_seen(theme: Theme) -> None:
    async with running_app((120, 40), Visit("plan"), TuiSettings(theme=theme.name)) as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.query(MemoryBars), "the room")
        await pilot.app.screen.mount(DownloadRow("o/model:Q4_K_M"))
        for kind, name in TRACKS:
            widget = pilot.app.screen.query(kind).first()
            assert contrast(widget.get_component_styles(name).color, widget.background_colors[1]) > 1.8, name
