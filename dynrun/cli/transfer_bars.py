"""Progress of a download on stderr: bars on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from dynrun.cli.output import say
from dynrun.hub.files import amount

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from dynrun.hub.transfer import FileProgress, Progress

_EVERY_S = 15.0
# Of a name, and of what stands beside it.
_LONGEST_NAME, _REST_WIDTH = 52, 48


def transfer_bars() -> LiveBars | Lines:
    """What fits where stderr goes; called with each :class:`dynrun.hub.transfer.Progress`, in a ``with`` block."""
    return LiveBars() if sys.stderr.isatty() else Lines()


class LiveBars:
    """A bar for each file that is on its way, and one for all, with rate and time left."""

    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console
        from rich.table import Column

        console = Console(stderr=True)
        self._name_width = max(12, min(_LONGEST_NAME, console.width - _REST_WIDTH))
        name = Column(width=self._name_width, no_wrap=True)
        self._bars: Bars = progress.Progress(
            progress.TextColumn("{task.description}", table_column=name),
            progress.BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            progress.TaskProgressColumn(table_column=Column(no_wrap=True, min_width=4)),
            progress.DownloadColumn(table_column=Column(no_wrap=True, min_width=15)),
            progress.TransferSpeedColumn(table_column=Column(no_wrap=True, min_width=10)),
            progress.TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
            console=console,
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._note = ""

    def __enter__(self) -> LiveBars:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._bars.stop()

    def __call__(self, now: Progress) -> None:
        for file in now.files:
            self._show(file)
        if len(now.files) > 1:
            self._update("all", sum(f.size for f in now.files), sum(f.done for f in now.files))
        if now.note and now.note != self._note:
            self._bars.console.print(now.note, markup=False, highlight=False)
        self._note = now.note

    def _show(self, file: FileProgress) -> None:
        name = file.path.rpartition("/")[2]
        checking = "checking " if file.done and file.done == file.size and not file.checked else ""
        room = self._name_width - len(checking)
        # The end of a name tells shards apart.
        shown = checking + (name if len(name) <= room else f"…{name[len(name) + 1 - room :]}")
        self._update(file.path, file.size, file.done, shown, visible=not file.checked)

    def _update(self, key: str, total: int, done: int, shown: str = "all", *, visible: bool = True) -> None:
        from rich.markup import escape

        if key not in self._tasks:
            # What was there before is no part of the rate.
            self._tasks[key] = self._bars.add_task(escape(shown), total=total, completed=done)
        self._bars.update(self._tasks[key], description=escape(shown), completed=done, visible=visible)


class Lines:
    """One line in a while, and one for each new trouble."""

    def __init__(self) -> None:
        self._last = self._started = time.monotonic()
        self._note = ""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, now: Progress) -> None:
        if now.note and now.note != self._note:
            say(now.note)
        self._note = now.note
        clock = time.monotonic()
        if clock - self._last >= _EVERY_S:
            self._last = clock
            done, size = sum(f.done for f in now.files), sum(f.size for f in now.files)
            rate = now.fetched_bytes / (clock - self._started)
            left = f", {(size - done) / rate / 60:.0f} min left" if rate else ""
            say(f"{amount(done)} of {amount(size)}, {amount(int(rate))} a second{left}")
