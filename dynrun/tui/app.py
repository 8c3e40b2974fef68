"""The app: rooms and how one gets from one to another, keys, themes, help. What is shown in a room is the room's own.

Starts no work itself. Rooms talk to it by messages (messages.py) that bubble up here.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.dom import DOMNode
from textual.filter import LineFilter
from textual.reactive import reactive
from textual.screen import Screen
from textual.theme import Theme
from textual.widgets import Input, TextArea

from dynrun.tui.collector import COLLECTOR, EVERY_S
from dynrun.tui.commands import Commands
from dynrun.tui.cycles import lean_strips
from dynrun.tui.line_filter import PrintableFilter
from dynrun.tui.messages import ModelsChanged, Visit
from dynrun.tui.rooms import BY_MODE, ROOMS, modes
from dynrun.tui.screens.room import RoomScreen
from dynrun.tui.settings import TuiSettings, check_keys, load_settings, remember_theme
from dynrun.tui.themes import DARK, LIGHT, THEMES

# Time for a room to end its child processes when the app quits; they die with the app anyway.
_LEAVE_S = 8.0
# The first screen and its list come before the other rooms.
_LOAD_AFTER_S = 1.0


class DynrunApp(App[int]):
    """`dynrun` without a command. ``visit``: where to begin, Models otherwise."""

    TITLE = "dynrun"
    CSS_PATH = "app.tcss"
    MODES: ClassVar[dict[str, Any]] = dict(modes())
    DEFAULT_MODE = "models"
    COMMAND_PALETTE_BINDING = "ctrl+p"
    COMMANDS: ClassVar[set[Any]] = {Commands}
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide")]  # noqa: RUF012 (no ClassVar in Textual either)
    VERTICAL_BREAKPOINTS = [(0, "-short"), (36, "-tall")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            # TextArea has function keys of its own: these go first.
            Binding(room.key, f"room('{room.mode}')", room.title, show=False, priority=True, id=f"app.{room.mode}")
            for room in ROOMS
        ),
        Binding("f1,question_mark", "help", "Help", key_display="?", id="app.help"),
        Binding("ctrl+o", "jump", "Jump", show=False, id="app.jump"),
        Binding("ctrl+p", "command_palette", "Palette", show=False, priority=True, id="app.palette"),
        Binding("f9", "toggle_dark", "Dark or light", show=False, id="app.theme"),
        Binding("ctrl+c", "copy_or_stop", "Copy or stop", show=False, priority=True, id="app.copy"),
        Binding("ctrl+q", "quit", "Quit", show=False, priority=True, id="app.quit"),
    ]

    activity: reactive[dict[str, str]] = reactive(dict)

    def __init__(self, visit: Visit | None = None, settings: TuiSettings | None = None) -> None:
        super().__init__()
        lean_strips()
        self._printable = PrintableFilter()
        self.settings = load_settings() if settings is None else settings
        self._first = visit
        for theme in THEMES:
            self.register_theme(theme)
        self.theme = self.settings.theme if self.settings.theme in self.available_themes else DARK.name
        if self.settings.keys:
            check_keys(self.settings.keys, binding_ids())
            self.set_keymap(self.settings.keys)

    def get_line_filters(self) -> Sequence[LineFilter]:
        return [self._printable, *super().get_line_filters()]

    async def on_mount(self) -> None:
        self.theme_changed_signal.subscribe(self, self._remember_theme)
        if self._first is not None:
            await self.on_visit(self._first)
        self.set_timer(_LOAD_AFTER_S, load_rooms)
        self.set_interval(EVERY_S, COLLECTOR.collect)

    def _remember_theme(self, theme: Theme) -> None:
        self.run_worker(asyncio.to_thread(remember_theme, theme.name), group="app.theme")

    async def on_visit(self, message: Visit) -> None:
        """Go to another room, and tell it what for."""
        if message.mode not in BY_MODE:
            return
        await self._enter(message.mode)
        if isinstance(self.screen, RoomScreen):
            await self.screen.visit(message)

    async def _enter(self, mode: str) -> None:
        """Go to a room. What it imports (numpy) takes long, so that happens in a thread."""
        await asyncio.to_thread(BY_MODE[mode].screen_class)
        await self.switch_mode(mode)

    def on_models_changed(self, _: ModelsChanged) -> None:
        for room in self.open_rooms():
            room.models_changed()

    def open_rooms(self) -> list[RoomScreen]:
        """The rooms that have been entered, whichever is in front."""
        stacks = (self.get_screen_stack(mode) for mode in self._screen_stacks)
        return [stack[0] for stack in stacks if stack and isinstance(stack[0], RoomScreen)]

    def show_activity(self, group: str, text: str) -> None:
        """What goes on in the background, in every room's header; an empty ``text`` ends it."""
        others = {name: shown for name, shown in self.activity.items() if name != group}
        self.activity = {**others, group: text} if text else others

    # Keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Rooms are not left, nor labels laid over them, while a dialogue is open."""
        return None if action in ("room", "jump", "help") and self.screen.is_modal else True

    async def action_room(self, mode: str) -> None:
        await self._enter(mode)

    def action_help(self) -> None:
        from dynrun.tui.screens.help import HelpScreen

        self.push_screen(HelpScreen(self.screen))

    def action_jump(self) -> None:
        from dynrun.tui.screens.jump import JumpScreen, targets

        if found := targets(self.screen):
            self.push_screen(JumpScreen(found))

    def action_toggle_dark(self) -> None:
        self.theme = LIGHT.name if self.current_theme.dark else DARK.name

    def action_copy_or_stop(self) -> None:
        """Ctrl+C: copy what is selected; else stop what runs in this room; else say how to quit."""
        if text := self._selected():
            self.copy_to_clipboard(text)
            self.notify(f"copied {len(text):,} characters", timeout=2)
        elif not (isinstance(self.screen, RoomScreen) and self.screen.stop()):
            self.notify("nothing is selected and nothing runs here; Ctrl+Q quits", timeout=3)

    def _selected(self) -> str:
        if isinstance(self.focused, Input | TextArea) and self.focused.selected_text:
            return self.focused.selected_text
        return self.screen.get_selected_text() or ""

    async def action_quit(self) -> None:
        """Stop the children of every room, then end."""
        leaving = [asyncio.ensure_future(room.leave()) for room in self.open_rooms()]
        if leaving:
            await asyncio.wait(leaving, timeout=_LEAVE_S)
        self.exit(0)

    def handle_bindings_clash(self, clashed_bindings: set[Binding], node: DOMNode) -> None:
        """Two of the user's keys are the same: say so once."""
        names = ", ".join(sorted(binding.id or binding.action for binding in clashed_bindings))
        if not getattr(self, "_clash_told", False):
            self._clash_told = True
            self.notify(f"your keys take those of: {names}", title="config.toml", severity="warning")

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """The palette: every room, everything the keys of this screen do, and what the room offers beside."""
        for room in ROOMS:
            yield SystemCommand(
                f"Go to {room.title}", f"{room.purpose} ({room.key.upper()})", partial(self._enter, room.mode)
            )
        # A binding of several keys is there once for each.
        once = {(active.node, active.binding.id): active for active in reversed(screen.active_bindings.values())}
        for node, binding, enabled, _ in reversed(once.values()):
            if enabled and binding.id and binding.description and not binding.action.startswith("room("):
                does = partial(self.run_action, binding.action, node)
                yield SystemCommand(binding.description, f"key {self.get_key_display(binding)}", does)
        if isinstance(screen, RoomScreen):
            yield from screen.commands()
        yield SystemCommand("Theme", "choose among all themes", self.action_change_theme)
        yield SystemCommand(
            "Screenshot", "save this screen as SVG", partial(self.set_timer, 0.1, self.deliver_screenshot)
        )


def load_rooms() -> None:
    """Import every room in the background, so that entering one takes no longer than drawing it."""
    threading.Thread(target=_load_rooms, name="rooms", daemon=True).start()


def _load_rooms() -> None:
    for room in ROOMS:
        room.screen_class()
    COLLECTOR.settle()


def binding_ids() -> set[str]:
    """The ids of all bindings: the app's, the dialogues' and every room's, with those of its widgets."""
    from dynrun.tui.screens.confirm import ConfirmScreen
    from dynrun.tui.screens.help import HelpScreen
    from dynrun.tui.screens.prompt import PromptScreen, RewriteScreen

    dialogues = ConfirmScreen, HelpScreen, PromptScreen, RewriteScreen
    classes: list[type[DOMNode]] = [DynrunApp, *dialogues, *(room.screen_class() for room in ROOMS)]
    return {binding.id for cls in classes for binding in all_bindings(cls) if binding.id}


def all_bindings(cls: type[DOMNode]) -> list[Binding]:
    """The bindings of a class, its bases, and of the widgets that a room names in ``KEYED``."""
    found = [b for base in cls.__mro__ for b in Binding.make_bindings(base.__dict__.get("BINDINGS", ()))]
    for widget in getattr(cls, "KEYED", ()):
        found += all_bindings(widget)
    return found


def run_app(visit: Visit | None = None) -> int:
    """Run the app on this terminal; its exit code. Raises UsageError for a bad ``[tui]`` in config.toml."""
    app = DynrunApp(visit)
    result = app.run()
    return result if isinstance(result, int) else app.return_code or 0
