"""What the Bench room measures, in a worker thread."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from dynrun.runtime.bench import Limits, Setup, bench, parse_tests
from dynrun.runtime.bench_history import Result, keep
from dynrun.runtime.bench_result import learn_from, result_of
from dynrun.runtime.bench_setups import parse_placements, setups
from dynrun.runtime.machine import Machine
from dynrun.runtime.placement import Choice, Placement
from dynrun.tui.builtin import make_first
from dynrun.tui.jobs import Job
from dynrun.tui.messages import Frozen


@dataclass(frozen=True)
class Request:
    """``models``: MODELs separated by blanks. ``placement``: of the one model, as it was planned, instead of names;
    ``path``: its file where that is known."""

    models: str
    placements: str
    tests: str
    seconds: float
    placement: Placement | None = None
    path: Path | None = None


@dataclass(eq=False)
class BenchProgress(Frozen):
    """After a round: how many, seconds used, and the widest interval as a part of its mean."""

    rounds: int
    elapsed_s: float
    widest: float


def measure(job: Job, request: Request) -> Result:
    """Run the bench and keep it.

    Raises UsageError for words that are no tests or placements, NotFoundError, ToolError.
    """
    from dynrun.config import load_config
    from dynrun.runtime.this_machine import this_machine

    tests, names = parse_tests(request.tests), parse_placements(request.placements)
    machine = this_machine()
    made = [one for model in request.models.split() for one in _setups(model, names, request, machine)]

    def progress(rounds: int, seconds: float, widest: float) -> None:
        job.check()
        job.post(BenchProgress(rounds, seconds, widest))

    found = bench(
        made,
        tests,
        Limits(seconds=request.seconds),
        n_threads=load_config().n_threads,
        on_progress=progress,
        cancel=job.stopped,
    )
    learn_from(made, found)
    result = result_of(found, machine)
    keep(result)
    return result


def _setups(model: str, names: tuple[str, ...], request: Request, machine: Machine) -> list[Setup]:
    from dynrun.config import load_config
    from dynrun.models import resolve
    from dynrun.runtime.opening import Where, planner_for

    make_first(model)
    path = request.path or resolve(model).path
    if request.placement is not None:
        (setup,) = setups(model, path, ("auto",), request.placement, bytes_per_s=machine.ram_bytes_per_s)
        return [replace(setup, placement=named(request.placement.choice))]
    where = Where(n_gpu_layers=load_config().n_gpu_layers)
    planned, _ = planner_for(path, where, machine).first()
    return setups(model, path, names, planned, bytes_per_s=machine.ram_bytes_per_s)


def named(choice: Choice) -> str:
    """A placement in the words of `bench --placements`."""
    if not choice.n_gpu_layers:
        return "cpu"
    moe = f"+ncmoe={choice.n_cpu_moe}" if choice.n_cpu_moe else ""
    return f"ngl={choice.n_gpu_layers}{moe}"
