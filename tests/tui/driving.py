"""Driving the app in tests: by keys and clicks, waiting for what it shows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from textual import events
from textual.pilot import Pilot
from textual.widget import Widget

from dynrun.tui.app import DynrunApp
from dynrun.tui.messages import Visit
from dynrun.tui.screens.room import RoomScreen
from dynrun.tui.settings import TuiSettings

AppPilot = Pilot[int]


@asynccontextmanager
async def running_app(
    size: tuple[int, int] = (80, 24), visit: Visit | None = None, settings: TuiSettings | None = None
) -> AsyncIterator[AppPilot]:
    """The app without a terminal, with its first room on the screen."""
    app = DynrunApp(visit, settings or TuiSettings())
    async with app.run_test(size=size, notifications=True) as pilot:
        await wait_until(pilot, lambda: isinstance(app.screen, RoomScreen), "the first room")
        yield pilot


async def wait_until(pilot: Pilot[Any], condition: Callable[[], Any], what: str = "", timeout_s: float = 120.0) -> None:
    """Until ``condition`` holds; fails with ``what`` and the screen's text when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        await pilot.pause()
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s for {what or condition}; the screen:\n{screen_text(pilot)}")
        # Workers are threads: let them have the processor.
        await asyncio.sleep(0.01)
    await pilot.pause()


def screen_text(pilot: Pilot[Any]) -> str:
    """What stands on the screen, line by line, without colours."""
    lines = pilot.app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip).rstrip() for strip in lines)


async def shows(pilot: Pilot[Any], text: str, timeout_s: float = 120.0) -> None:
    """Until ``text`` stands somewhere on the screen."""
    await wait_until(pilot, lambda: text in screen_text(pilot), f"the text {text!r}", timeout_s)


async def type_text(pilot: Pilot[Any], text: str) -> None:
    """Press the keys of ``text``."""
    names = {" ": "space", "\n": "enter"}
    await pilot.press(*(names.get(character, character) for character in text))


async def paste(pilot: Pilot[Any], text: str) -> None:
    """As a terminal does it."""
    pilot.app.post_message(events.Paste(text))
    await pilot.pause()


def one(pilot: Pilot[Any], selector: str, kind: type[Widget] = Widget) -> Any:
    """The one widget of the screen in front that ``selector`` finds."""
    return pilot.app.screen.query_one(selector, kind)
