"""`make` for the Make room: a child process (make_worker.py), its stages, probes and result as frozen messages.

What was stopped, or killed, goes on where it was when it is started again: that is make.py's own way.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dynrun.errors import DynrunError
from dynrun.llamacpp.process import ToolError, exit_reason, new_log, stream
from dynrun.tui.jobs import Job
from dynrun.tui.make_worker import MARK
from dynrun.tui.messages import Frozen
from dynrun.tui.order import CurveResult, Measured, Order, Result


@dataclass(eq=False)
class StageBegan(Frozen):
    """A stage of `make` begins, or is found."""

    name: str
    detail: str


@dataclass(eq=False)
class StageMoved(Frozen):
    """``done`` of ``total`` in the stage that began last."""

    done: float
    total: float
    note: str


@dataclass(eq=False)
class UnitProbed(Frozen):
    """A tensor (or group of some) in these types gave the weights an ``error`` and the model a ``kld``."""

    unit: str
    types: str
    error: float
    kld: float

    @property
    def slope(self) -> float:
        """KLD per unit of error: what a tensor's error costs."""
        return self.kld / self.error if self.error > 0 else 0.0


class _FailedError(DynrunError):
    def __init__(self, line: str, exit_code: int) -> None:
        super().__init__(line)
        self.exit_code = exit_code


def run(job: Job, order: Order) -> Result | CurveResult:
    """Have it done in a child process, which ends with the job, and with the app.

    Raises DynrunError with what the child says, StoppedError where the user stopped it.
    """
    log = new_log("make")
    ended: list[tuple[str, Any]] = []

    def take(line: str) -> None:
        if line.startswith(MARK):
            kind, value = json.loads(line.removeprefix(MARK))
            _TOLD[kind](job, value) if kind in _TOLD else ended.append((kind, value))

    command = [sys.executable, "-m", "dynrun.tui.make_worker", json.dumps(asdict(order))]
    try:
        done = stream(command, take, log=log, check=False, cancel=job.stopped)
    except ToolError:
        job.check()
        raise
    kind, value = ended[-1] if ended else _death(done.exit_code, log)
    if kind == "error":
        raise _FailedError(*value)
    return _curve(value) if order.what == "curve" else _result(value)


def _death(exit_code: int, log: Path) -> tuple[str, Any]:
    return "error", [f"make ended with {exit_reason(exit_code)} (log: {log})", 1]


_TOLD = {
    "stage": lambda job, value: job.post(StageBegan(*value)),
    "progress": lambda job, value: job.post(StageMoved(*value)),
    "probe": lambda job, value: job.post(UnitProbed(*value)),
}


def _result(value: dict[str, Any]) -> Result:
    rows = tuple(Measured(**{**row, "ci95": tuple(row["ci95"])}) for row in value["rows"])
    ratio = None if value["ratio"] is None else tuple(value["ratio"])
    return Result(**{**value, "rows": rows, "ratio": ratio})


def _curve(value: dict[str, Any]) -> CurveResult:
    return CurveResult(tuple(map(tuple, value["rows"])), tuple(map(tuple, value["presets"])))


def page_of(result: Result) -> str:
    """The report's address."""
    return Path(result.report).resolve().as_uri()
