"""The home of the app: the models on this machine."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable

from dynrun.tui.jobs import Job, start_job
from dynrun.tui.messages import JobDone, JobFailed
from dynrun.tui.screens.room import RoomScreen

LISTING = "models.list"


class ModelsScreen(RoomScreen):
    """Local models."""

    MODE = "models"
    CSS_PATH = "models.tcss"
    HELP = "# Models\n\nThe models on this machine."
    BINDINGS: ClassVar[list[BindingType]] = [Binding("r", "refresh", "Refresh", id="models.refresh")]

    def body(self) -> ComposeResult:
        yield DataTable(id="local", cursor_type="row")

    def on_mount(self) -> None:
        self.query_one(DataTable).add_columns("name", "quant", "size", "architecture")
        self.action_refresh()

    def action_refresh(self) -> None:
        start_job(self, _listed, group=LISTING, exclusive=True)

    def on_job_done(self, message: JobDone) -> None:
        table = self.query_one(DataTable)
        table.clear()
        for model in message.result:
            table.add_row(model.name, model.quant, f"{model.size_bytes / 1e6:,.1f} MB", model.architecture)

    def on_job_failed(self, message: JobFailed) -> None:
        self.notify(message.message, severity="error")


def _listed(job: Job) -> object:
    from dynrun.models import list_models

    return list_models()
