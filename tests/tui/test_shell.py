"""The shell of the app: rooms, keys, palette, help, jump mode, themes, Ctrl+C and Ctrl+Q."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from textual.binding import Binding
from textual.widgets import Footer

from dynrun.errors import UsageError
from dynrun.tui.app import DynrunApp, binding_ids
from dynrun.tui.messages import JobFailed, Visit
from dynrun.tui.rooms import ROOMS
from dynrun.tui.screens.room import RoomScreen
from dynrun.tui.settings import TuiSettings, load_settings
from tests.tui.driving import running_app, screen_text, shows, type_text, wait_until

pytestmark = pytest.mark.tui

SIZES = [(80, 24), (200, 60)]


@pytest.mark.parametrize("size", SIZES, ids=str)
async def test_every_room_opens_by_its_key_and_by_a_click(size: tuple[int, int]) -> None:
    async with running_app(size) as pilot:
        for room in ROOMS:
            await pilot.press(room.key)
            await wait_until(pilot, lambda room=room: pilot.app.current_mode == room.mode, room.mode)
            first = screen_text(pilot).splitlines()[0]
            assert all(one.title in first for one in ROOMS)
            assert pilot.app.screen.query_one(Footer).region.bottom == size[1]
        await pilot.click("RoomTab")
        await wait_until(pilot, lambda: pilot.app.current_mode == "models", "the click")


async def test_help_shows_keys_with_their_ids_and_closes() -> None:
    async with running_app((100, 50)) as pilot:
        for key, leave in (("f1", "escape"), ("question_mark", "f1")):
            await pilot.press(key)
            await shows(pilot, "models.refresh")
            assert "app.jump" in screen_text(pilot)
            await pilot.press("f3", leave)
            await wait_until(pilot, lambda: not pilot.app.screen.is_modal, "help to close")
            assert pilot.app.current_mode == "models", "a dialogue is not left by a room's key"


async def test_jump_mode_goes_to_what_the_letter_stands_on() -> None:
    async with running_app() as pilot:
        await pilot.press("tab", "ctrl+o")
        await wait_until(pilot, lambda: pilot.app.screen.is_modal, "jump mode")
        assert " a " in screen_text(pilot)
        await pilot.press("a")
        await wait_until(pilot, lambda: not pilot.app.screen.is_modal, "the jump")
        await pilot.press("ctrl+o", "escape")
        await wait_until(pilot, lambda: not pilot.app.screen.is_modal, "the way back")


async def test_palette_finds_and_runs_commands() -> None:
    async with running_app() as pilot:
        dark = pilot.app.current_theme.dark
        await pilot.press("ctrl+p")
        await shows(pilot, "Go to Models")
        await type_text(pilot, "dark or")
        await shows(pilot, "Dark or light")
        await pilot.press("enter")
        await wait_until(pilot, lambda: pilot.app.current_theme.dark != dark, "the other theme")


async def test_palette_offers_each_command_once() -> None:
    async with running_app() as pilot:
        titles = [command.title for command in pilot.app.get_system_commands(pilot.app.screen)]
        assert "Delete" in titles, "which has two keys"
        assert len(set(titles)) == len(titles)


async def test_a_chosen_theme_is_remembered_and_the_configuration_goes_first(tmp_path: Path) -> None:
    async with running_app() as pilot:
        await pilot.press("f9")
        await wait_until(pilot, lambda: load_settings().theme == "dynrun-light", "the theme on disk")
    async with running_app(settings=load_settings()) as pilot:
        assert not pilot.app.current_theme.dark


async def test_keys_are_remapped_by_id() -> None:
    async with running_app(settings=TuiSettings(keys={"app.theme": "f8", "models.search": "g"})) as pilot:
        await pilot.press("f9")
        assert pilot.app.current_theme.dark
        await pilot.press("f8")
        await wait_until(pilot, lambda: not pilot.app.current_theme.dark, "the remapped key")
        await shows(pilot, "g Search")


async def test_an_unknown_binding_id_is_told_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no key binding is called 'app\.jmp' — did you mean app\.jump"):
        DynrunApp(settings=TuiSettings(keys={"app.jmp": "f8"}))


async def test_every_binding_has_an_id_that_no_other_action_has() -> None:
    seen: dict[str, str] = {}
    for room in ROOMS:
        for binding in own_bindings(room.screen_class()):
            assert binding.id, (room.mode, binding)
            assert seen.setdefault(binding.id, binding.action) == binding.action, binding.id
    assert {"app.quit", "app.copy", "models.refresh", "help.close", "confirm.yes", "prompt.cancel"} <= binding_ids()


def own_bindings(screen: type[RoomScreen]) -> list[Binding]:
    """The bindings that dynrun's classes bring, not Textual's."""
    ours = [cls for kind in (screen, *screen.KEYED) for cls in kind.__mro__ if cls.__module__.startswith("dynrun")]
    return [binding for cls in ours for binding in Binding.make_bindings(cls.__dict__.get("BINDINGS", ()))]


async def test_ctrl_c_never_quits_and_ctrl_q_does() -> None:
    async with running_app() as pilot:
        await pilot.press("ctrl+c")
        await shows(pilot, "Ctrl+Q quits")
        assert pilot.app.is_running
        await pilot.press("ctrl+q")
        await wait_until(pilot, lambda: pilot.app.return_code is not None, "the end")
        assert pilot.app.return_code == 0


async def test_messages_are_frozen() -> None:
    message = JobFailed("group", "name", "it failed")
    with pytest.raises(dataclasses.FrozenInstanceError):
        message.message = "it did not"


async def test_a_visit_opens_the_room_it_names() -> None:
    async with running_app(visit=Visit(ROOMS[-1].mode)) as pilot:
        await wait_until(pilot, lambda: pilot.app.current_mode == ROOMS[-1].mode, "the room")


def test_the_commands_do_not_import_textual() -> None:
    code = "import dynrun.cli.app, sys; sys.exit('textual' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
