"""The app with a watch on its event loop: the child of tui_chat.py and tui.py.

    .venv/bin/python benchmarks/tui_watched.py NOTES [MODEL]

On Ctrl+Q it writes NOTES (JSON): each gap of the loop that was longer than usual, with the processor time that the
loop's thread spent in it, the mode it was in, and what the last message of a conversation shows.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from textual.widgets import Markdown  # noqa: E402

from dynrun.tui.app import DynrunApp  # noqa: E402
from dynrun.tui.messages import Visit  # noqa: E402
from dynrun.tui.widgets.markdown_piece import MarkdownPiece  # noqa: E402
from dynrun.tui.widgets.message_view import MessageView  # noqa: E402

_BEAT_S = 0.005


@dataclass(frozen=True)
class Gap:
    """The loop did not come back for ``wall_s``; its thread worked for ``cpu_s`` of it."""

    at_s: float
    wall_s: float
    cpu_s: float
    mode: str


class WatchedApp(DynrunApp):
    """Nothing is changed but that a task looks at the clock."""

    CSS_PATH = str(ROOT / "dynrun" / "tui" / "app.tcss")

    def __init__(self, notes: Path, visit: Visit | None) -> None:
        super().__init__(visit)
        self._notes, self._gaps = notes, list[Gap]()

    async def on_mount(self) -> None:
        self._watch = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        while True:
            await asyncio.sleep(_BEAT_S)
            now, used = time.perf_counter(), time.thread_time()
            self._gaps.append(Gap(time.time(), max(now - wall - _BEAT_S, 0.0), used - cpu, self.current_mode))
            wall, cpu = now, used

    async def action_quit(self) -> None:
        self._watch.cancel()
        pieces = [piece for view in list(self.screen.query(MessageView))[-1:] for piece in view.query(MarkdownPiece)]
        drawn = [markdown.source for piece in pieces for markdown in piece.query(Markdown)]
        notes = {
            "gaps": [asdict(gap) for gap in self._gaps if gap.wall_s > _BEAT_S],
            "cpu_s": time.thread_time(),
            "shown": "".join(piece.text for piece in pieces),
            "drawn": drawn == [piece.opener + piece.text for piece in pieces if not piece.asleep],
        }
        self._notes.write_text(json.dumps(notes), encoding="utf-8")
        await super().action_quit()


def main(notes: str, model: str = "") -> None:
    WatchedApp(Path(notes), Visit("chat", model) if model else None).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
