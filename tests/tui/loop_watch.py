"""What the thread of the app's event loop did in the rooms that could have kept it waiting: files, processes,
connections, imports. A program of its own, as a module is imported once in a process; prints JSON."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from dynrun.tui.messages import Visit
from dynrun.tui.rooms import ROOMS
from tests.tiny import write_tiny_llama
from tests.tui.driving import AppPilot, running_app, shows, type_text, wait_until
from tests.tui.scripted_server import Scripted, scripted_server

_WATCHED = {"open", "os.listdir", "os.scandir", "os.rename", "os.remove", "subprocess.Popen", "socket.connect"}
# Textual reads a room's stylesheet when the room is entered: two kilobytes.
_SMALL = (".tcss",)
_ANSWER = (
    "Text with `code`:\n\n",
    "```python\nprint(1)\n```\n\n",
    "```\nof no language\n```\n\n",
    "```nolanguage\nx\n```\n\n",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n# End\n",
)


class Watch:
    """Keeps what ``thread`` did, and from where in dynrun it was called; nothing while that is None."""

    def __init__(self) -> None:
        self.thread: int | None = None
        self.found: list[str] = []
        sys.addaudithook(self._take)

    def _take(self, event: str, arguments: tuple[Any, ...]) -> None:
        if threading.get_ident() != self.thread or not (event in _WATCHED or event == "import"):
            return
        subject = str(arguments[0])
        if subject.endswith(_SMALL):
            return
        frame: FrameType | None = sys._getframe(1)
        caller = "Textual"
        while frame is not None and caller == "Textual":
            code = frame.f_code
            caller = code.co_qualname if "/dynrun/" in code.co_filename else caller
            frame = frame.f_back
        self.found.append(f"{event} {subject} from {caller}")


async def use(pilot: AppPilot) -> None:
    """Every room; in Chat a question, its answer, the list of conversations, a second one."""
    for room in ROOMS:
        await pilot.press(room.key)
        await wait_until(pilot, lambda room=room: pilot.app.current_mode == room.mode, room.mode)
    await pilot.press("f4")
    await type_text(pilot, "Hi")
    await pilot.press("enter")
    await shows(pilot, "a second")
    await pilot.press("ctrl+l")
    await shows(pilot, "now Hi")
    await pilot.press("ctrl+l", "ctrl+n", "f9")


async def watched(folder: Path) -> list[str]:
    model = write_tiny_llama(folder / "tiny.gguf", n_embd=32, n_block=1, n_ff=32, n_head=2, n_head_kv=1)
    watch = Watch()
    with scripted_server(model, Scripted([_ANSWER])):
        async with running_app((140, 40), visit=Visit("chat", model=str(model))) as pilot:
            await shows(pilot, "of 4k")
            watch.thread = threading.get_ident()
            await use(pilot)
            watch.thread = None
    return watch.found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asyncio.run(watched(Path(folder)))))


if __name__ == "__main__":
    main()
