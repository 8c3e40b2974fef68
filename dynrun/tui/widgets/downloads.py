"""The downloads that go on, wait, failed or are done; hidden while there are none."""

from __future__ import annotations

from textual.containers import VerticalScroll

from dynrun.tui.widgets.download_row import DownloadRow, State


class Downloads(VerticalScroll, can_focus=False):
    """Rows by MODEL."""

    DEFAULT_CSS = """
    Downloads {
        height: auto;
        max-height: 9;
        border-top: solid $border;
        display: none;

        &.-any { display: block; }
    }
    """

    def rows(self) -> list[DownloadRow]:
        return list(self.query(DownloadRow))

    def row(self, model: str) -> DownloadRow | None:
        """The row of ``model``."""
        return next((row for row in self.rows() if row.model == model), None)

    def add(self, model: str, state: State) -> DownloadRow:
        """A new row, or the one that is there."""
        if (row := self.row(model)) is None:
            row = DownloadRow(model, state)
            self.mount(row)
        self.add_class("-any")
        self.border_title = "Downloads"
        return row

    async def drop(self, row: DownloadRow) -> None:
        """Away with it."""
        await row.remove()
        self.set_class(bool(self.rows()), "-any")
