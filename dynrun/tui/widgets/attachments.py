"""What goes with the next question, in a line above it."""

from __future__ import annotations

from pathlib import Path

from textual.widgets import Static

from dynrun.errors import DynrunError
from dynrun.tui.conversing import Attachment, attachment_of


class Attachments(Static):
    """Hidden while there are none."""

    def __init__(self) -> None:
        super().__init__("", id="attached", markup=False)
        self._held: list[Attachment] = []
        self.display = False

    @property
    def held(self) -> tuple[Attachment, ...]:
        return tuple(self._held)

    def add(self, one: Attachment) -> None:
        self._held.append(one)
        self._show()

    def add_file(self, path: Path) -> None:
        """A text or an image; what is neither is told."""
        try:
            self.add(attachment_of(path))
        except DynrunError as error:
            self.app.notify(str(error), severity="error")

    def drop_last(self) -> None:
        del self._held[-1:]
        self._show()

    def drop_all(self) -> None:
        self._held.clear()
        self._show()

    def _show(self) -> None:
        self.update("  ".join(f"[{one.label}]" for one in self._held))
        self.display = bool(self._held)
