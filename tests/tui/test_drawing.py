"""What each drawing costs: no cycles of references, one layout for what comes at once, keys before layouts."""

from __future__ import annotations

import asyncio
import gc
import math
from collections import Counter
from typing import Any

import pytest
from rich.segment import Segment
from textual._styles_cache import StylesCache
from textual.cache import FIFOCache
from textual.map_geometry import MapGeometry
from textual.strip import Strip
from textual.widget import Widget

from dynrun.runtime.history import Message, new_chat
from dynrun.tui import cycles
from dynrun.tui.chatting import EngineFailed
from dynrun.tui.messages import Visit
from dynrun.tui.screens.room import RoomScreen
from dynrun.tui.widgets.document import Document
from dynrun.tui.widgets.engine_card import EngineCard
from dynrun.tui.widgets.markdown_piece import MarkdownPiece
from dynrun.tui.widgets.transcript import Transcript
from tests.tui.driving import AppPilot, one, running_app, shows, wait_until

pytestmark = pytest.mark.tui


async def grow(pilot: AppPilot, words: int) -> None:
    view = await one(pilot, "#transcript", Transcript).add(0, Message("assistant", ""), "m")
    for n in range(words):
        await view.grow(f"word {n}" + ("\n\n" if n % 5 == 4 else " "), "")
        await shows(pilot, f"word {n}")


async def test_an_answer_leaves_no_lines_and_no_places_to_the_collector() -> None:
    async with running_app((80, 24), visit=Visit("chat")) as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.query(Transcript), "the room")
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            await grow(pilot, 30)
            gc.collect()
            left = Counter(type(thing) for thing in gc.garbage)
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        # Of widgets that are gone some are left, and what they show with them; there were thousands.
        assert left[Strip] < 50
        assert left[MapGeometry] < 10


def line_caches() -> int:
    return sum(type(thing) is StylesCache for thing in gc.get_objects())


def documents() -> list[Document]:
    # By type, for isinstance asks every object for its __class__, which a deprecated one answers with a warning.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Document)]


async def test_what_sleeps_is_kept_by_nothing() -> None:
    paragraph = "word " * 100 + "\n\n- one\n- two\n\n```python\nx = 1\n```\n\n"
    async with running_app((80, 24), visit=Visit("chat")) as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.query(Transcript), "the room")
        before = line_caches()
        view = await one(pilot, "#transcript", Transcript).add(0, Message("assistant", ""), "m")
        for n in range(40):
            await view.grow(f"{paragraph}part {n}\n\n", "")
            await shows(pilot, f"part {n}")
        pieces = pilot.app.screen.query(MarkdownPiece)
        await wait_until(pilot, lambda: sum(piece.asleep for piece in pieces) > 15, "what is far to sleep")
        gone: list[Widget] = []

        def few_are_left() -> bool:
            gc.unfreeze()
            gc.collect()
            gone[:] = [document for document in documents() if not document.is_attached]
            return len(gone) < 5

        await wait_until(pilot, few_are_left, "documents of what sleeps to go")
        # Lines are drawn into caches that go with their widgets: what is awake has some, and what another test left.
        assert line_caches() - before < 120


def test_lines_are_as_textual_makes_them() -> None:
    cycles.lean_strips()
    line = Strip([Segment("word"), Segment(" and another")])
    assert set(cycles.SIZES) == {name for name in Strip.__slots__ if name.endswith("_cache")} - {"_render_cache"}
    assert line.divide([16]) == [line]
    assert [part.text for part in line.divide([2, 16])] == ["wo", "rd and another"]
    assert line.crop(5, 8).text == "and"
    assert line.crop(5, 8) is line.crop(5, 8), "kept"
    assert isinstance(line._crop_cache, FIFOCache)
    assert line.cell_length == 16
    assert line._render_cache is None
    assert not line.link_ids


async def test_keys_are_shown_while_a_layout_has_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_app((80, 24), visit=Visit("chat")) as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.query("#composer"), "the room")
        room, drawn = pilot.app.screen, list[str]()
        assert isinstance(room, RoomScreen)
        display = pilot.app._display

        def kept(screen: Any, update: Any) -> None:
            if not pilot.app._batch_count:
                drawn.append("".join(segment.text for strip in room._compositor.render_strips() for segment in strip))
            display(screen, update)

        async def shown(letter: str) -> None:
            pilot.app.simulate_key(letter)
            while not any(letter in text for text in drawn):
                await asyncio.sleep(0.01)

        monkeypatch.setattr(pilot.app, "_display", kept)
        room._layout_due_s = math.inf
        room.query_one(Transcript).refresh(layout=True)
        await wait_until(pilot, lambda: room._layout_required, "a layout that waits")
        await shown("λ")
        with pilot.app.batch_update():
            await shown("μ")
        assert room._layout_required
        room._layout_due_s = 0.0
        await wait_until(pilot, lambda: not room._layout_required, "the layout")


async def test_a_card_is_seen_though_its_layout_has_to_wait() -> None:
    async with running_app((80, 24), visit=Visit("chat")) as pilot:
        await wait_until(pilot, lambda: pilot.app.screen.query(Transcript), "the room")
        room, transcript = pilot.app.screen, one(pilot, "#transcript", Transcript)
        assert isinstance(room, RoomScreen)
        messages = [Message("user", f"question {n}") for n in range(12)]
        await transcript.show(new_chat("m").said(*messages))
        await shows(pilot, "question 11")
        room._layout_due_s = math.inf
        await transcript.add_card(EngineCard(EngineFailed("it died", "")))
        await wait_until(pilot, lambda: isinstance(pilot.app.focused, EngineCard), "its focus")
        room._layout_due_s = 0.0
        await shows(pilot, "Nothing is lost")
