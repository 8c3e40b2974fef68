"""What fits: every quant of a model with its verdict, and one of them placed by sliders."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.app import ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import Container, VerticalScroll
from textual.dom import DOMNode
from textual.widgets import DataTable, Static

from dynrun.runtime.command import command_line
from dynrun.tui.jobs import start_job
from dynrun.tui.messages import JobDone, JobFailed, Visit
from dynrun.tui.planning import (
    KV_TYPES,
    VERDICTS,
    Knobs,
    Quant,
    QuantPlanned,
    QuantRecommended,
    QuantsFound,
    Shown,
    contexts,
    open_model,
    placement_of,
)
from dynrun.tui.screens.prompt import PromptScreen
from dynrun.tui.screens.room import RoomScreen
from dynrun.tui.widgets.layer_map import LayerMap
from dynrun.tui.widgets.memory_bars import MemoryBars
from dynrun.tui.widgets.quant_table import QuantTable
from dynrun.tui.widgets.slider import Slider
from dynrun.tui.words import context

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dynrun.runtime.machine import Machine

OPEN, REPLAN = "plan.open", "plan.replan"
_AUTOMATIC = 0
_LABEL = 15


class PlanScreen(RoomScreen):
    """Re-plans while a slider moves."""

    MODE = "plan"
    CSS_PATH = "plan.tcss"
    KEYED: ClassVar[tuple[type[DOMNode], ...]] = (Slider,)
    HELP = """
# Plan

Every quant of a model or of a repository of the Hub (only headers are read, nothing is downloaded): whether it lies all
on the GPU, in GPU and RAM, in RAM, is paged from disk, or does not fit, and how fast it will be. The number is
**measured**, **calibrated** by what was measured here, or **estimated**.

**Tab** goes to the sliders: context, type of the KV cache, layers on the GPU, layers whose experts stay in RAM. Moving
one of the last two takes the placement into your hands; `a` gives it back. `c` launches a chat with exactly this
placement, `b` measures it, `y` copies the llama-server command, `d` downloads the quant.
"""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("o", "open", "Open", id="plan.open"),
        Binding("c", "launch('chat')", "Chat", id="plan.launch"),
        Binding("b", "launch('bench')", "Bench", id="plan.bench"),
        Binding("d", "download", "Download", id="plan.download"),
        Binding("a", "automatic", "Auto", id="plan.automatic"),
        Binding("y", "copy", "Copy", id="plan.copy"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._machine: Machine | None = None
        self._machine_file: Path | None = None
        self._knobs = Knobs()
        self._shown: Shown | None = None
        self._opened: tuple[str, Path | None] = ("", None)

    def body(self) -> ComposeResult:
        yield Static("Press o and name a model, or p on one in Models.", id="title", markup=False)
        with Container(id="panes"):
            yield QuantTable(id="quants")
            with VerticalScroll(id="placed", can_focus=False):
                yield Slider("context", [_AUTOMATIC], shown=_context, label_width=_LABEL, id="n_ctx")
                yield Slider("KV cache", KV_TYPES, label_width=_LABEL, id="type_kv")
                yield Slider("GPU layers", [0], label_width=_LABEL, id="n_gpu_layers")
                yield Slider("experts in RAM", [0], label_width=_LABEL, id="n_cpu_moe")
                yield Static("", id="verdict", markup=False)
                yield MemoryBars(id="bars")
                yield LayerMap(id="map")
                yield Static("", id="command", markup=False)
            yield Static("", id="fault", markup=False)

    def on_mount(self) -> None:
        self.query_one("#placed").display = False

    async def visit(self, visit: Visit) -> None:
        if visit.model:
            self.open(visit.model, visit.path)

    def open(self, model: str, path: Path | None = None) -> None:
        """Plan MODEL; ``path``: its file where it is known."""
        self._opened, self._shown = (model, path), None
        self.query_one("#title", Static).update(f"{model}: reading …")
        self.query_one(QuantTable).show(())
        self.query_one("#placed").display = False
        start_job(
            self,
            lambda job: open_model(model, path, job.post, self._this_machine()),
            group=OPEN,
            name=model,
            exclusive=True,
        )

    def _this_machine(self) -> Machine:
        """Asked in worker threads; the same one afterwards, so that sliders need not ask."""
        if self._machine is None:
            from dynrun.runtime.machine import read_machine
            from dynrun.runtime.this_machine import this_machine

            self._machine = read_machine(self._machine_file) if self._machine_file else this_machine()
        return self._machine

    # What workers tell

    def on_quants_found(self, message: QuantsFound) -> None:
        note = f" ({message.note})" if message.note else ""
        machine = f" on {self._machine_file.stem}" if self._machine_file else ""
        self.query_one("#title", Static).update(f"{message.title}{machine}{note}")
        self.query_one(QuantTable).show(message.quants)
        self.set_focus(self.query_one(QuantTable))

    def on_quant_planned(self, message: QuantPlanned) -> None:
        table = self.query_one(QuantTable)
        table.update(message.index, message.quant)
        if message.index == table.chosen:
            self._choose()

    def on_quant_recommended(self, message: QuantRecommended) -> None:
        table = self.query_one(QuantTable)
        table.recommend(message.index)
        if not self._knobs.manual and table.chosen == 0:
            table.move_cursor(row=message.index)

    def on_job_failed(self, message: JobFailed) -> None:
        if message.group == OPEN:
            self.query_one("#title", Static).update(message.message)
        else:
            self.notify(message.message, severity="error")

    def on_job_done(self, message: JobDone) -> None:
        if message.group == REPLAN:
            self._show(message.result)

    # The quant under the cursor, and its placement

    @property
    def quant(self) -> Quant | None:
        table = self.query_one(QuantTable)
        return table.quants[table.chosen] if 0 <= table.chosen < len(table.quants) else None

    @on(DataTable.RowHighlighted, "#quants")
    def _choose(self) -> None:
        self.refresh_bindings()
        quant = self.quant
        placed = self.query_one("#placed")
        placed.display = quant is not None and quant.facts is not None
        fault = self.query_one("#fault", Static)
        fault.update(quant.error if quant else "")
        fault.display = not placed.display
        if quant is None or quant.facts is None:
            return
        steps = contexts(quant.facts.n_ctx_train)
        self.query_one("#n_ctx", Slider).set_steps([_AUTOMATIC, *steps], self._knobs.n_ctx or _AUTOMATIC)
        self._knobs = replace(self._knobs, n_gpu_layers=None, n_cpu_moe=None)
        self._replan()

    @on(DataTable.RowSelected, "#quants")
    def _to_sliders(self) -> None:
        if self.query_one("#placed").display:
            self.set_focus(self.query_one("#n_ctx"))

    @on(Slider.Changed)
    def _moved(self, message: Slider.Changed) -> None:
        if message.slider.id == "n_ctx":
            self._knobs = replace(self._knobs, n_ctx=message.value or None)
        elif message.slider.id == "type_kv":
            self._knobs = replace(self._knobs, type_kv=message.value)
        elif message.slider.id == "n_gpu_layers":
            self._knobs = replace(self._knobs, n_gpu_layers=message.value)
        elif message.slider.id == "n_cpu_moe":
            self._knobs = replace(self._knobs, n_cpu_moe=message.value)
        self._replan()

    def _replan(self) -> None:
        quant, machine, knobs = self.quant, self._machine, self._knobs
        if quant is None or quant.facts is None or machine is None:
            return
        facts = quant.facts
        start_job(self, lambda _: placement_of(facts, machine, knobs), group=REPLAN, exclusive=True)

    def _show(self, shown: Shown) -> None:
        self._shown = shown
        choice, facts = shown.placement.choice, shown.facts
        layers, experts = self.query_one("#n_gpu_layers", Slider), self.query_one("#n_cpu_moe", Slider)
        layers.set_steps(range(facts.n_layer + 2), choice.n_gpu_layers)
        experts.set_steps(range(len(facts.moe_layers) + 1), choice.n_cpu_moe)
        layers.display = bool(shown.machine.devices)
        experts.display = bool(shown.machine.devices and facts.moe_layers)
        self.query_one("#verdict", Static).update(_verdict(shown, self._knobs))
        self.query_one(MemoryBars).show(shown)
        self.query_one(LayerMap).show(shown)
        self.query_one("#command", Static).update(self._command())

    def _command(self) -> str:
        assert self._shown is not None
        quant = self.quant
        model = str(quant.path) if quant and quant.path else f"{self._shown.facts.name}.gguf"
        return shlex.join(command_line(self._shown.placement, model))

    # Keys

    def action_open(self) -> None:
        def named(model: str | None) -> None:
            if model:
                self.open(model)

        question = "Which model? A name from Models, a GGUF, or owner/repo of the Hub:"
        self.app.push_screen(PromptScreen(question, value=self._opened[0]), named)

    def action_automatic(self) -> None:
        self._knobs = replace(self._knobs, n_gpu_layers=None, n_cpu_moe=None)
        self._replan()

    def action_copy(self) -> None:
        if self._shown is not None:
            self.app.copy_to_clipboard(self._command())
            self.notify("copied the llama-server command", timeout=2)

    def action_launch(self, mode: str) -> None:
        quant = self.quant
        if quant is None or self._shown is None:
            return
        if self._machine_file is not None:
            self.notify("this is planned for another machine", severity="warning")
        elif quant.path is not None:
            path = quant.path if mode == "bench" else None
            self.post_message(Visit(mode, quant.model, placement=self._shown.placement, path=path))

    def action_download(self) -> None:
        if (quant := self.quant) is not None and quant.path is None:
            self.post_message(Visit("models", quant.model))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """What is not here can be downloaded; what is here, run."""
        if not self.is_mounted or action not in ("launch", "download", "automatic", "copy"):
            return True
        if (quant := self.quant) is None or quant.facts is None:
            return False
        return action in ("automatic", "copy") or (quant.path is None) == (action == "download")

    def commands(self) -> Iterable[SystemCommand]:
        yield SystemCommand(
            "Plan for another machine", "a TOML file as of dynrun plan --machine", self._ask_for_machine
        )
        yield SystemCommand("Plan for this machine", "look again at what is free here", self._look_again)

    def _ask_for_machine(self) -> None:
        def named(text: str | None) -> None:
            if text:
                self._plan_for(Path(text).expanduser())

        self.app.push_screen(PromptScreen("TOML file that describes the machine:"), named)

    def _look_again(self) -> None:
        self._plan_for(None)

    def _plan_for(self, machine: Path | None) -> None:
        self._machine, self._machine_file = None, machine
        if self._opened[0]:
            self.open(*self._opened)


def _context(n: int) -> str:
    return context(n) if n else "auto"


def _verdict(shown: Shown, knobs: Knobs) -> str:
    placement = shown.placement
    by_hand = ", by hand" if knobs.manual else ""
    line = f"{VERDICTS[placement.verdict]}{by_hand} at {context(placement.choice.n_ctx)} of context"
    if placement.fits:
        line += f": {placement.tokens_per_second:.1f} tokens/s ({placement.basis})"
    return f"{line}\n{placement.reason}" if placement.reason else line
