"""The home of the app: models on this machine, the Hub's search, details of either, downloads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical
from textual.dom import DOMNode
from textual.widgets import ContentSwitcher, DataTable, Input

from dynrun.tui import catalog, pulling
from dynrun.tui.jobs import running, start_job, stop_jobs
from dynrun.tui.messages import JobDone, JobFailed, JobStopped, ModelsChanged, Visit
from dynrun.tui.screens.confirm import ConfirmScreen
from dynrun.tui.screens.room import RoomScreen
from dynrun.tui.unfinished import remember, unfinished
from dynrun.tui.widgets.download_row import DownloadRow, State
from dynrun.tui.widgets.downloads import Downloads
from dynrun.tui.widgets.hit_table import HitTable
from dynrun.tui.widgets.model_details import ModelDetails
from dynrun.tui.widgets.model_table import ModelTable
from dynrun.tui.widgets.repository_details import RepositoryDetails
from dynrun.tui.words import size

if TYPE_CHECKING:
    from dynrun.hub.resolve import Found
    from dynrun.hub.search import Hit

LISTING, DETAILS, SEARCH, REPOSITORY = (f"models.{name}" for name in ("list", "details", "search", "repository"))
PULL, DISCARD, REMEMBER, DELETION, DELETE = (
    f"models.{name}" for name in ("pull", "discard", "remember", "deletion", "delete")
)


class ModelsScreen(RoomScreen):
    """Home."""

    MODE = "models"
    CSS_PATH = "models.tcss"
    KEYED: ClassVar[tuple[type[DOMNode], ...]] = (ModelTable, DownloadRow)
    HELP = """
# Models

The models on this machine: built-in ones, what **make** made, and what was downloaded. **KLD** is the mean divergence
from the reference as it was measured when the file was made.

Type `/` and words: the list is filtered as you type, and **Enter** searches the Hub. **Enter** on a repository shows
its quants, `d` downloads the one under the cursor, `p` plans all of them before anything is downloaded. Downloads go on
while you work elsewhere: **Space** pauses one, `x` cancels it. After a crash they are there again, paused.
"""
    BINDINGS: ClassVar[list[BindingType]] = [
        # With priority, or letters that are typed at once would go to the list.
        Binding("slash", "search", "Search", priority=True, id="models.search"),
        Binding("c", "visit('chat')", "Chat", id="models.chat"),
        Binding("p", "plan", "Plan", id="models.plan"),
        Binding("m", "visit('make')", "Make", id="models.make"),
        Binding("b", "visit('bench')", "Bench", id="models.bench"),
        Binding("d", "pull", "Download", id="models.pull"),
        Binding("delete,backspace", "delete", "Delete", key_display="del", id="models.delete"),
        Binding("r", "refresh", "Refresh", show=False, id="models.refresh"),
        Binding("escape", "back", "Back", show=False, id="models.back"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._dropped: set[str] = set()
        self._remembering = asyncio.Lock()

    def body(self) -> ComposeResult:
        yield Input(placeholder="/ to search: words filter the list, Enter asks the Hub", compact=True, id="search")
        with Container(id="panes"):
            with ContentSwitcher(initial="local", id="lists"):
                yield ModelTable(id="local")
                yield HitTable(id="hits")
            with ContentSwitcher(initial="details", id="about"):
                yield ModelDetails(id="details")
                yield RepositoryDetails(id="repository")
        with Vertical(id="bottom"):
            yield Downloads(id="downloads")

    def on_mount(self) -> None:
        self.set_focus(self.query_one(ModelTable))
        # Reading headers would delay the first screen.
        self.call_after_refresh(self.action_refresh)
        for model in unfinished():
            self.query_one(Downloads).add(model, "paused")

    async def visit(self, visit: Visit) -> None:
        """From Plan: a quant to download."""
        if visit.model:
            self._pull(visit.model)

    # What is on this machine

    def models_changed(self) -> None:
        self.action_refresh()

    def action_refresh(self) -> None:
        start_job(self, lambda _: catalog.local_models(), group=LISTING, exclusive=True)

    @on(DataTable.RowHighlighted, "#local")
    def _look_at_model(self) -> None:
        if (model := self.query_one(ModelTable).chosen) is not None:
            name = str(model.listed.path)
            start_job(self, lambda _: catalog.details_of(model.listed), group=DETAILS, name=name, exclusive=True)

    @on(DataTable.RowSelected, "#local")
    def _enter_model(self) -> None:
        self.set_focus(self.query_one(ModelDetails).query_one("Tabs"))

    def action_visit(self, mode: str) -> None:
        if model := self.query_one(ModelTable).chosen:
            here = model.listed.path if mode in ("plan", "bench") and model.listed.size_bytes else None
            self.post_message(Visit(mode, model.listed.name, path=here))

    def action_plan(self) -> None:
        if self._on_hub:
            self.post_message(Visit("plan", self._repository_name))
        else:
            self.action_visit("plan")

    def action_delete(self) -> None:
        if (model := self.query_one(ModelTable).chosen) is not None and model.listed.size_bytes:
            start_job(self, lambda _: pulling.plan_deletion(model.listed), group=DELETION, exclusive=True)

    def _ask_to_delete(self, removal: pulling.Removal) -> None:
        def delete() -> str:
            removal.execute()
            return size(removal.freed_bytes)

        def answered(yes: bool | None) -> None:
            if yes:
                start_job(self, lambda _: delete(), group=DELETE)

        self.app.push_screen(ConfirmScreen(removal.question, "Delete"), answered)

    # The Hub

    @property
    def _on_hub(self) -> bool:
        return self.query_one("#lists", ContentSwitcher).current == "hits"

    @property
    def _repository_name(self) -> str:
        found = self.query_one(RepositoryDetails).found
        return found.repository.name if found else self.query_one(HitTable).chosen

    def action_search(self) -> None:
        self.set_focus(self.query_one("#search", Input))

    def action_back(self) -> None:
        """From the quants to the hits, from the hits to this machine."""
        if self.focused is self.query_one("#quants"):
            self.set_focus(self.query_one(HitTable))
        else:
            self._show_lists("local", "details")
            self.query_one("#search", Input).value = ""
            self.set_focus(self.query_one(ModelTable))

    @on(Input.Changed, "#search")
    def _filter(self, event: Input.Changed) -> None:
        self.query_one(ModelTable).filter(event.value)

    @on(Input.Submitted, "#search")
    def _search(self, event: Input.Submitted) -> None:
        if words := event.value.strip():
            self._show_lists("hits", "repository")
            self.query_one(RepositoryDetails).say(f"searching the Hub for {words} …")
            start_job(self, lambda _: pulling.search_hub(words), group=SEARCH, name=words, exclusive=True)

    @on(DataTable.RowSelected, "#hits")
    def _open_repository(self) -> None:
        if name := self.query_one(HitTable).chosen:
            self.query_one(RepositoryDetails).say(f"reading {name} …")
            start_job(self, lambda _: pulling.open_repository(name), group=REPOSITORY, name=name, exclusive=True)

    def _show_lists(self, left: str, right: str) -> None:
        self.query_one("#lists", ContentSwitcher).current = left
        self.query_one("#about", ContentSwitcher).current = right
        self.refresh_bindings()

    # Downloads

    def action_pull(self) -> None:
        details = self.query_one(RepositoryDetails)
        if details.found is not None and (variant := details.chosen) is not None:
            self._pull(pulling.name_of(details.found, variant))

    @on(DataTable.RowSelected, "#quants")
    def _pull_chosen(self) -> None:
        self.action_pull()

    def _pull(self, model: str) -> None:
        row = self.query_one(Downloads).add(model, "waiting")
        if row.state == "running":
            return
        row.set_state("waiting")
        start_job(self, lambda job: pulling.pull(job, model), group=f"{PULL}.{model}", name=model)
        self._downloads_changed()

    @on(DownloadRow.Toggled)
    def _toggle(self, message: DownloadRow.Toggled) -> None:
        row = message.row
        if row.state in ("running", "waiting"):
            stop_jobs(self, f"{PULL}.{row.model}")
        elif row.state != "done":
            self._pull(row.model)

    @on(DownloadRow.Dropped)
    async def _drop(self, message: DownloadRow.Dropped) -> None:
        row = message.row
        if stop_jobs(self, f"{PULL}.{row.model}"):
            # What has come is removed once nobody writes it any more.
            self._dropped.add(row.model)
        elif row.state != "done":
            self._discard(row.model)
        await self.query_one(Downloads).drop(row)
        self._downloads_changed()

    def _discard(self, model: str) -> None:
        self._dropped.discard(model)
        start_job(self, lambda _: pulling.discard(model), group=DISCARD, name=model)

    def on_pull_progress(self, message: pulling.PullProgress) -> None:
        if row := self.query_one(Downloads).row(message.model):
            row.advance(message.progress)
            self._show_activity()

    def _downloads_changed(self) -> None:
        self.run_worker(self._remember(), group=REMEMBER)
        self._show_activity()

    async def _remember(self) -> None:
        """One after the other, so that what is written last is what is so."""
        async with self._remembering:
            models = [row.model for row in self.query_one(Downloads).rows() if row.state != "done"]
            await asyncio.to_thread(remember, models)

    def _show_activity(self) -> None:
        rows = [row for row in self.query_one(Downloads).rows() if row.state == "running" and row.total_bytes]
        done, total = sum(row.done_bytes for row in rows), sum(row.total_bytes for row in rows)
        self.dynrun.show_activity(PULL, f"↓ {done / total:.0%} of {size(total)}" if rows else "")

    # What workers tell

    def on_job_done(self, message: JobDone) -> None:
        if message.group.startswith(f"{PULL}."):
            self._pull_ended(message.name, "done")
        else:
            self._results[message.group](message)

    @property
    def _results(self) -> dict[str, Callable[[JobDone], None]]:
        return {
            LISTING: lambda done: self._show_models(done.result),
            DETAILS: lambda done: self.query_one(ModelDetails).show(done.result),
            SEARCH: lambda done: self._show_hits(done.name, done.result),
            REPOSITORY: lambda done: self._show_repository(*done.result),
            DISCARD: lambda done: self.notify(f"{size(done.result)} of {done.name} freed"),
            DELETION: lambda done: self._ask_to_delete(done.result),
            DELETE: lambda done: self._deleted(done.result),
        }

    def _show_models(self, models: list[catalog.LocalModel]) -> None:
        self.query_one(ModelTable).show(models)
        if not models:
            self.query_one(ModelDetails).clear()

    def _show_repository(self, found: Found, here: frozenset[str]) -> None:
        self.query_one(RepositoryDetails).show(found, here)
        self.set_focus(self.query_one("#quants"))
        self.refresh_bindings()

    def _deleted(self, freed: str) -> None:
        self.notify(f"{freed} freed")
        self.post_message(ModelsChanged())

    def _show_hits(self, words: str, hits: list[Hit]) -> None:
        table = self.query_one(HitTable)
        table.show(hits)
        self.set_focus(table)
        hint = "Enter on one shows its quants" if hits else f"the Hub finds no GGUF for {words}"
        self.query_one(RepositoryDetails).say(hint)

    def _pull_ended(self, model: str, state: State, note: str = "") -> None:
        if row := self.query_one(Downloads).row(model):
            row.set_state(state, note)
            self._downloads_changed()
        if state == "done":
            self.post_message(ModelsChanged())

    def on_job_failed(self, message: JobFailed) -> None:
        if message.group.startswith(f"{PULL}."):
            self._pull_ended(message.name, "failed", message.message)
        elif message.group in (SEARCH, REPOSITORY):
            self.query_one(RepositoryDetails).say(message.message)
        else:
            self.notify(message.message, severity="error", timeout=10)

    def on_job_stopped(self, message: JobStopped) -> None:
        if message.name in self._dropped:
            self._discard(message.name)
        elif message.group.startswith(f"{PULL}."):
            self._pull_ended(message.name, "paused")

    def stop(self) -> bool:
        """Ctrl+C pauses the downloads."""
        rows = [row for row in self.query_one(Downloads).rows() if running(self, f"{PULL}.{row.model}")]
        for row in rows:
            stop_jobs(self, f"{PULL}.{row.model}")
        return bool(rows)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys that do nothing with what is under the cursor are not shown."""
        if not self.is_mounted:
            return True
        if action == "search":
            return not isinstance(self.focused, Input)
        if action in ("visit", "delete"):
            return not self._on_hub
        if action == "pull":
            return self._on_hub and self.query_one(RepositoryDetails).found is not None
        return True
