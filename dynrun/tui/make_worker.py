"""A child of making.py: one `make`, or one curve, told line by line.

Takes an Order as JSON in its first argument. Its events are lines that begin with MARK, on standard output; whatever
else is printed is for the log. A process of its own, as Python's interpreter can keep only one of two things going: the
linear algebra, or the app.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dynrun.errors import DynrunError
from dynrun.tui.order import CurveResult, Measured, Order, Result

if TYPE_CHECKING:
    from dynrun.make import Made

MARK = "\x1e"
_EVERY_S = 0.1
# As stages.sensitivity_stage says a probe.
_PROBE = re.compile(r"(?P<unit>\S+) (?P<types>\S.*): error (?P<error>[\d.e+-]+), KLD (?P<kld>[\d.e+-]+)")
Say = Callable[[str, Any], None]


@dataclass
class Telling:
    """make.py's Reporter, for another process."""

    say: Say
    _told_s: float = field(default=0.0)

    def stage(self, name: str, detail: str) -> None:
        self._told_s = 0.0
        self.say("stage", [name, detail])

    def progress(self, done: float, total: float, note: str = "") -> None:
        if (probe := probe_of(note)) is not None:
            self.say("probe", probe)
        now = time.monotonic()
        if now - self._told_s >= _EVERY_S or done >= total:
            self._told_s = now
            self.say("progress", [done, total, note])


def probe_of(note: str) -> list[Any] | None:
    """Unit, types, error and KLD of the probe that a note of progress tells of; None where it tells of none."""
    match = _PROBE.fullmatch(note)
    return [match["unit"], match["types"], float(match["error"]), float(match["kld"])] if match else None


def make(order: Order, telling: Telling) -> Result:
    """The whole pipeline. Raises what make.py raises."""
    from dynrun.make import make as make_model

    made = make_model(
        order.model, order.target(), order.settings(), telling, lambda _: None, commands=(order.command(),)
    )
    ratio = made.ratio
    return Result(
        file=str(made.file),
        report=str(made.report.page),
        rows=_rows(made),
        predicted_kld=made.scheme.predicted_kld,
        ratio=None if ratio is None else (ratio.value, *ratio.ci95),
    )


def _rows(made: Made) -> tuple[Measured, ...]:
    named = ((f"dynrun {made.scheme.label}", made.row), (f"stock {made.baseline.ftype}", made.baseline_row))
    return tuple(
        Measured(name, r.size_bytes, r.bpw, r.kld.mean, r.kld.ci95, r.kld.p99, r.same_top_p, r.ppl) for name, r in named
    )


def curve(order: Order, telling: Telling) -> CurveResult:
    """The predicted KLD of every size, with all that must be measured for it; `make` finds that again."""
    from dynrun.choose import after_feedback
    from dynrun.make import ready
    from dynrun.stages import sensitivity_stage
    from dynrun.target import curve_for

    settings = order.settings()
    with ready(order.model, settings, telling) as shared:
        inputs = (shared.reference, shared.collected.imatrix)
        table = sensitivity_stage(*inputs, shared.texts, settings, telling, lambda _: None)
        priced = after_feedback(table, shared.feedback, telling)
        telling.stage("curve", "every size, and the stock presets")
        found = curve_for(*inputs, priced.tensors, settings.constraints, plain=table.tensors)
    rows = tuple((row.size_bytes, row.predicted_kld) for row in found.rows)
    return CurveResult(rows, tuple((preset.ftype, preset.size_bytes) for preset in found.presets))


def main(argv: list[str]) -> int:
    """Do it, tell it; the exit code."""
    # llama.cpp prints as it likes: what stands on our standard output is ours.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(kind: str, value: Any) -> None:
        events.write(f"{MARK}{json.dumps([kind, value])}\n")
        events.flush()

    order = Order(**json.loads(argv[0]))
    try:
        result = (make if order.what == "make" else curve)(order, Telling(say))
    except DynrunError as error:
        say("error", [str(error), error.exit_code])
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        say("error", [f"unexpected error: {type(error).__name__}: {error} — please report it", 1])
        return 1
    say("result", asdict(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
