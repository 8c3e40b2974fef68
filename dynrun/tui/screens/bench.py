"""How fast models run here: benches, their history, and comparisons that respect the noise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Horizontal
from textual.widgets import ContentSwitcher, DataTable, Input, Label, Static

from dynrun.runtime.bench_history import Result, comparisons, kept
from dynrun.tui.benching import BenchProgress, Request, measure, named
from dynrun.tui.jobs import running, start_job, stop_jobs
from dynrun.tui.messages import JobDone, JobFailed, JobStopped, Visit
from dynrun.tui.screens.room import RoomScreen
from dynrun.tui.widgets.change_table import ChangeTable
from dynrun.tui.widgets.history_table import HistoryTable, when
from dynrun.tui.widgets.speed_table import SpeedTable
from dynrun.tui.words import duration

if TYPE_CHECKING:
    from dynrun.runtime.placement import Placement

RUN, HISTORY = "bench.run", "bench.history"
# At least one round of anything.
_LEAST_SECONDS = 1.0


class BenchScreen(RoomScreen):
    """Benches go on while one works elsewhere."""

    MODE = "bench"
    CSS_PATH = "bench.tcss"
    HELP = """
# Bench

Tokens per second of prompt processing (`pp`) and generation (`tg`), by llama-bench in rounds until the 95% intervals
are within 3%, or the time is used up. `where`: `auto` (what a chat would use), `cpu`, `gpu`, `moe` (experts in
RAM), `ngl=N`, `ncmoe=N`. **of memory**: the share of the measured bandwidth that generation reaches. Intervals in
yellow stayed too wide: other programs were running.

Every bench is kept. **Enter** on one of the past shows it, `v` compares the one that is shown with the one under the
cursor: a difference counts only beyond the noise of both. Benches of `auto` teach the planner.
"""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "start", "Start", id="bench.start"),
        Binding("x", "stop_bench", "Stop", id="bench.stop"),
        Binding("v", "compare", "Compare", id="bench.compare"),
        Binding("e", "edit", "Edit", id="bench.edit"),
        Binding("escape", "leave_field", "To the tables", show=False, id="bench.tables"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._result: Result | None = None
        self._seconds = 0.0
        self._planned: tuple[str, Placement, Path | None] | None = None

    def body(self) -> ComposeResult:
        with Horizontal(id="request"):
            yield Label("models")
            yield Input("demo", id="models", compact=True)
            yield Label("where")
            yield Input("auto", id="placements", compact=True)
            yield Label("tests")
            yield Input("pp512,tg128", id="tests", compact=True)
            yield Label("seconds")
            yield Input("300", id="seconds", compact=True, type="integer")
        yield Static("s starts", id="status", markup=False)
        with Container(id="panes"):
            with ContentSwitcher(initial="rows", id="shown"):
                yield SpeedTable(id="rows")
                yield ChangeTable(id="changes")
            yield HistoryTable(id="history")

    def on_mount(self) -> None:
        self.set_focus(self.query_one(HistoryTable))
        start_job(self, lambda _: kept(), group=HISTORY, exclusive=True)

    async def visit(self, visit: Visit) -> None:
        """A model to measure; with a placement, exactly that one."""
        if not visit.model:
            return
        self.query_one("#models", Input).value = visit.model
        if visit.placement is None:
            return
        self.query_one("#placements", Input).value = named(visit.placement.choice)
        self._planned = (visit.model, visit.placement, visit.path)
        self._say("as planned: s starts")

    # Running

    def action_start(self) -> None:
        if running(self, RUN):
            return
        models, placements, tests = (
            self.query_one(f"#{name}", Input).value for name in ("models", "placements", "tests")
        )
        placement, path = None, None
        if self._planned and (models, placements) == (self._planned[0], named(self._planned[1].choice)):
            _, placement, path = self._planned
            placements = "auto"
        self._seconds = max(float(self.query_one("#seconds", Input).value or 0), _LEAST_SECONDS)
        request = Request(models, placements, tests, self._seconds, placement, path)
        start_job(self, lambda job: measure(job, request), group=RUN, name=models)
        self._say("the first round …", "bench: round 1")
        self.refresh_bindings()

    def on_bench_progress(self, message: BenchProgress) -> None:
        noise = f"±{message.widest:.1%}" if message.rounds > 1 else "unknown yet"
        used = f"{duration(message.elapsed_s)} of {duration(self._seconds)} at most"
        self._say(f"round {message.rounds} done, {used}, widest interval {noise}", f"bench: round {message.rounds + 1}")

    def on_job_done(self, message: JobDone) -> None:
        if message.group == HISTORY:
            self.query_one(HistoryTable).show(message.result)
            return
        self._show(message.result)
        self._say(_summary(message.result))
        start_job(self, lambda _: kept(), group=HISTORY, exclusive=True)

    def on_job_failed(self, message: JobFailed) -> None:
        self._say(message.message)

    def on_job_stopped(self, message: JobStopped) -> None:
        if message.group == RUN:
            self._say("stopped; nothing was kept of it")

    def _say(self, text: str, activity: str = "") -> None:
        self.query_one("#status", Static).update(text)
        self.dynrun.show_activity(RUN, activity)
        self.refresh_bindings()

    def action_stop_bench(self) -> None:
        self.stop()

    def stop(self) -> bool:
        return stop_jobs(self, RUN)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Start or stop, whichever there is."""
        if action in ("start", "stop_bench") and self.is_mounted:
            return running(self, RUN) == (action == "stop_bench")
        return True

    # Looking

    def _show(self, result: Result) -> None:
        self._result = result
        self.query_one("#shown", ContentSwitcher).current = "rows"
        self.query_one(SpeedTable).show(result)

    @on(DataTable.RowSelected, "#history")
    def _show_chosen(self) -> None:
        if (result := self.query_one(HistoryTable).chosen) is not None:
            self._show(result)
            self._say(_summary(result))

    def action_compare(self) -> None:
        before = self.query_one(HistoryTable).chosen
        if before is None or self._result is None:
            self._say("Enter shows a bench, then v on another one compares the two")
            return
        changes = comparisons(before, self._result)
        if not changes:
            self._say("the two have no row in common: the same model, placement and test")
            return
        self.query_one("#shown", ContentSwitcher).current = "changes"
        self.query_one(ChangeTable).show(changes)
        self._say(f"before: the bench of {when(before)}; after: that of {when(self._result)}")

    def action_edit(self) -> None:
        self.set_focus(self.query_one("#models", Input))

    def action_leave_field(self) -> None:
        self.set_focus(self.query_one(HistoryTable))

    @on(Input.Submitted)
    def _submitted(self) -> None:
        self.set_focus(self.query_one(HistoryTable))
        self.action_start()


def _summary(result: Result) -> str:
    machine, drift = result.get("machine", {}), result.get("drift")
    line = f"{machine.get('name', '')}, {machine.get('backend', '')}, llama.cpp {machine.get('llama_cpp', '')}"
    if drift and drift.get("throttled"):
        line += f"; its speed changed by {drift['change']:+.0%} meanwhile: it throttles, or other programs run"
    return line
