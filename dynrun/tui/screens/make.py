"""Making a quant: which model, how large, of which types; then the stages as they go, and the proof."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.dom import DOMNode
from textual.suggester import SuggestFromList
from textual.widgets import Checkbox, DataTable, Input, Select, Static

from dynrun.tui.jobs import running, start_job, stop_jobs
from dynrun.tui.making import StageBegan, StageMoved, UnitProbed, page_of, run
from dynrun.tui.messages import JobDone, JobFailed, JobStopped, ModelsChanged, Visit
from dynrun.tui.order import LABELS, CurveResult, Order, Result
from dynrun.tui.screens.room import RoomScreen
from dynrun.tui.widgets.sensitivity_map import SensitivityMap
from dynrun.tui.widgets.slider import Slider
from dynrun.tui.widgets.stage_list import StageList
from dynrun.tui.words import size

if TYPE_CHECKING:
    from dynrun.models import Listed

MAKE, KNOWN = "make.run", "make.known"
_LABEL = 12
_MENUS = {
    "all": "all types that every stock engine loads",
    "k": "no IQ types: faster on CPUs and old GPUs",
    "arm": "types that Arm CPUs repack",
    "new": "also MXFP4, NVFP4, TQ: recent engines only",
}


class MakeScreen(RoomScreen):
    """One `make` at a time; it goes on in the background while other rooms are looked at."""

    MODE = "make"
    CSS_PATH = "make.tcss"
    KEYED: ClassVar[tuple[type[DOMNode], ...]] = (Slider,)
    HELP = """
# Make

Names a full-precision model (a GGUF, a folder of safetensors, a repository), a size, and makes the best file of that
size; then measures it beside the stock preset of the same size, on text that was not calibrated on.

**m** starts. **v** measures first what every size would cost, and puts it on the slider with the stock presets marked;
`m` then goes on from there. **Ctrl+C** stops; started again it goes on where it was, after a crash too. When it is
done, **o** opens the report and **c** talks to the new file.
"""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("m", "make", "Make", id="make.make"),
        Binding("v", "curve", "Curve first", id="make.curve"),
        Binding("o", "report", "Open report", id="make.report"),
        Binding("c", "chat", "Chat", id="make.chat"),
        Binding("escape", "unfocus", "Leave field", id="make.unfocus"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.made: Result | None = None
        self._klds: Mapping[int, float] = {}

    def body(self) -> ComposeResult:
        with VerticalScroll(id="make", can_focus=False):
            with Horizontal(classes="field"):
                yield Static("reference", classes="label")
                yield Input(
                    placeholder="a GGUF, a folder of safetensors, owner/repo, demo", compact=True, id="reference"
                )
            yield Slider("size", LABELS, value="Q4_K_M", shown=self._shown_size, label_width=_LABEL, id="budget")
            with Horizontal(classes="field"):
                yield Static("types", classes="label")
                options = [(f"{name}: {about}", name) for name, about in _MENUS.items()]
                yield Select[str](options, value="all", allow_blank=False, compact=True, id="menu")
            with Horizontal(classes="field"):
                yield Static("calibration", classes="label")
                yield Input("builtin", compact=True, id="calibration")
            with Horizontal(classes="field"):
                yield Static("tokens", classes="label")
                yield Input("32768", compact=True, type="integer", id="tokens")
            yield Checkbox("error feedback in rounding", value=True, compact=True, id="feedback")
            yield Static("", id="make-fault", markup=False)
            yield StageList(id="stages")
            yield SensitivityMap(id="sensitivity")
            yield DataTable(id="proof", cursor_type="none", show_cursor=False)
            yield Static("", id="verdict", markup=False)

    def on_mount(self) -> None:
        self.query_one("#proof").display = False
        self.models_changed()

    def models_changed(self) -> None:
        from dynrun.models import list_models

        start_job(self, lambda _: list_models(), group=KNOWN, exclusive=True)

    def _know_models(self, listed: Iterable[Listed]) -> None:
        names = ["demo", "demo-moe", *(one.name for one in listed if one.quant in ("F16", "BF16", "F32"))]
        self.query_one("#reference", Input).suggester = SuggestFromList(dict.fromkeys(names), case_sensitive=False)

    async def visit(self, visit: Visit) -> None:
        if visit.model or visit.path:
            self.query_one("#reference", Input).value = str(visit.path or visit.model)

    def _shown_size(self, step: Any) -> str:
        if isinstance(step, str):
            return f"as {step}"
        return f"{size(step)}, KLD ~{self._klds[step]:.4f}" if step in self._klds else size(step)

    # What the user wants

    def _order(self, what: str) -> Order | None:
        """None where something is missing; that is said."""
        model = self.query_one("#reference", Input).value.strip()
        if not model:
            self._fault("Name the model to quantize first.")
            self.query_one("#reference", Input).focus()
            return None
        order = Order(
            what=what,
            model=model,
            size=self.query_one("#budget", Slider).value,
            menu=str(self.query_one("#menu", Select).value),
            calibration=self.query_one("#calibration", Input).value.strip() or "builtin",
            tokens=int(self.query_one("#tokens", Input).value or 32768),
            feedback=self.query_one("#feedback", Checkbox).value,
        )
        self._fault("")
        return order

    def _fault(self, text: str) -> None:
        self.query_one("#make-fault", Static).update(text)

    def action_make(self) -> None:
        self._start("make")

    def action_curve(self) -> None:
        self._start("curve")

    def _start(self, what: str) -> None:
        if running(self, MAKE):
            self.notify("one is being made; Ctrl+C stops it", timeout=3)
            return
        order = self._order(what)
        if order is None:
            return
        self.query_one(StageList).clear()
        self.query_one("#proof").display = False
        self.query_one("#verdict", Static).update("")
        self.made = None
        self.refresh_bindings()
        start_job(self, lambda job: run(job, order), group=MAKE, name=what)

    def stop(self) -> bool:
        return stop_jobs(self, MAKE)

    async def leave(self) -> None:
        stop_jobs(self, MAKE)

    # What the worker tells

    def on_stage_began(self, message: StageBegan) -> None:
        self.query_one(StageList).begin(message.name, message.detail)
        self.dynrun.show_activity(MAKE, f"make: {message.name}")

    def on_stage_moved(self, message: StageMoved) -> None:
        self.query_one(StageList).move(message.done, message.total, message.note)

    def on_unit_probed(self, message: UnitProbed) -> None:
        self.query_one(SensitivityMap).add(message)

    def on_job_done(self, message: JobDone) -> None:
        if message.group == KNOWN:
            self._know_models(message.result)
            return
        self._ended("")
        if message.name == "curve":
            self._show_curve(message.result)
        else:
            self._show_made(message.result)

    def on_job_failed(self, message: JobFailed) -> None:
        if message.group == MAKE:
            self._ended("failed")
        self._fault(message.message)

    def on_job_stopped(self, message: JobStopped) -> None:
        if message.group == MAKE:
            self._ended("stopped; m goes on here")

    def _ended(self, ending: str) -> None:
        self.query_one(StageList).end(ending)
        self.dynrun.show_activity(MAKE, "")

    def _show_curve(self, curve: CurveResult) -> None:
        """Every size on the slider, with its predicted KLD, the presets where they are."""
        self._klds = dict(curve.rows)
        steps, presets = list(self._klds), {name: n for name, n in curve.presets if name in LABELS}
        marks = {min(range(len(steps)), key=lambda i: abs(steps[i] - n)): name for name, n in presets.items()}
        slider = self.query_one("#budget", Slider)
        slider.set_steps(steps, presets.get(str(slider.value), steps[len(steps) // 2]), marks)
        slider.focus()
        self.query_one("#verdict", Static).update("The curve is on the slider; m makes the size under its knob.")

    def _show_made(self, made: Result) -> None:
        self.made = made
        table = self.query_one(DataTable)
        table.clear(columns=True)
        table.add_columns("", "size", "bpw", "mean KLD (95%)", "p99", "same top", "PPL")
        for row in made.rows:
            low, high = row.ci95
            table.add_row(
                *(row.name, size(row.size_bytes), f"{row.bpw:.2f}", f"{row.kld:.4f} ({low:.4f}–{high:.4f})"),
                *(f"{row.p99:.3f}", f"{row.same_top_p:.1%}", f"{row.ppl:.2f}"),
            )
        table.display = True
        self.query_one("#verdict", Static).update(_verdict(made))
        self.refresh_bindings()
        self.dynrun.post_message(ModelsChanged())
        self.call_after_refresh(self.query_one("#make").scroll_end, animate=False)

    # The result

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "unfocus":
            # Letters are keys again then.
            return isinstance(self.focused, Input)
        return None if action in ("report", "chat") and self.made is None else True

    def action_report(self) -> None:
        if self.made is not None:
            self.app.open_url(page_of(self.made))

    def action_chat(self) -> None:
        if self.made is not None:
            self.post_message(Visit("chat", model=self.made.file))

    def action_unfocus(self) -> None:
        self.set_focus(None)

    @on(Input.Submitted)
    def _next_field(self) -> None:
        self.focus_next()

    @on(Input.Changed, "#reference")
    def _another_model(self) -> None:
        """Sizes on the slider were another model's."""
        if self._klds:
            self._klds = {}
            self.query_one("#budget", Slider).set_steps(LABELS, "Q4_K_M")
        self.query_one(SensitivityMap).clear()


def _verdict(made: Result) -> str:
    lines = []
    if made.predicted_kld is not None:
        lines.append(f"predicted KLD {made.predicted_kld:.4f}, measured {made.rows[0].kld:.4f}")
    if made.ratio is not None:
        value, low, high = made.ratio
        lines.append(f"{value:.3f} ({low:.3f}–{high:.3f}) of the stock preset's KLD")
    return "\n".join([*lines, f"file    {made.file}", f"report  {made.report}"])
