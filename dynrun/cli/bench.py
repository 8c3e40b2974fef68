"""`dynrun bench`: tokens per second, with their noise."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options
from dynrun.cli.output import Ticker, emit, say
from dynrun.cli.running import Running, placed
from dynrun.errors import UsageError

if TYPE_CHECKING:
    from dynrun.runtime.bench import Bench, Setup
    from dynrun.runtime.bench_history import Compared, Result
    from dynrun.runtime.machine import Machine

Tests = Annotated[
    str, typer.Option("--tests", metavar="LIST", help="ppN reads N tokens, tgN generates N; @dN behind N others.")
]
Placements = Annotated[
    str, typer.Option("--placements", metavar="LIST", help="auto, cpu, gpu, moe, ngl=N, ncmoe=N, ngl=N+ncmoe=N.")
]
Precision = Annotated[
    float, typer.Option("--precision", min=0.001, max=1.0, help="Go on until 95% intervals are within this part.")
]
MaxSeconds = Annotated[float, typer.Option("--max-seconds", min=1.0, help="But not much longer than this.")]
CompareWith = Annotated[
    str | None, typer.Option("--compare", metavar="last|FILE", help="Beside an earlier bench: the last one, or a JSON.")
]
TypesFile = Annotated[
    Path | None,
    typer.Option("--types", metavar="FILE", help="Measure each tensor type instead, for `make --speed-table FILE`."),
]
Menu = Annotated[str, typer.Option("--menu", metavar="MENU", help="Of --types: all, new, k, arm; or Q4_K,Q6_K,…")]


@placed
def bench(
    settings: Running,
    models: Annotated[list[str] | None, typer.Argument(metavar="MODEL…", help="As for `dynrun run`.")] = None,
    tests: Tests = "pp512,tg128",
    placements: Placements = "auto",
    precision: Precision = 0.03,
    max_seconds: MaxSeconds = 300.0,
    compare: CompareWith = None,
    types: TypesFile = None,
    menu: Menu = "all",
    as_json: options.AsJson = False,
) -> None:
    """Measure how fast models run on this machine, until the noise is small; every bench is kept.

    Example: dynrun bench demo:Q3_K_M --placements auto,cpu --compare last
    """
    if types is not None:
        _types(types, models, menu, settings, as_json)
        return
    if not models:
        raise UsageError("which model?", fix="name one, as in: dynrun bench demo")

    from dynrun.runtime.bench import Limits, parse_tests
    from dynrun.runtime.bench_history import keep, last_like, read_result
    from dynrun.runtime.bench_result import result_of
    from dynrun.runtime.bench_setups import parse_placements

    wanted, named = parse_tests(tests), parse_placements(placements)
    # What is wrong with it is told before minutes of measuring.
    before = None if compare in (None, "last") else read_result(Path(str(compare)))
    machine, made = _setups(models, named, settings)
    found = _measure(made, wanted, Limits(precision, max_seconds))
    data = result_of(found, machine)
    # Before this one is the last.
    before = last_like(data) if compare == "last" else before
    keep(data)
    changes = _changes(compare, before, data)
    told = {**data, "comparison": [asdict(change) for change in changes]} if compare else data
    emit(as_json, told, lambda: _show(found, changes, precision))


def _setups(models: list[str], placements: tuple[str, ...], settings: Running) -> tuple[Machine, list[Setup]]:
    from dynrun.models import resolve
    from dynrun.runtime.bench_setups import setups
    from dynrun.runtime.opening import planner_for
    from dynrun.runtime.remote_devices import with_rpc
    from dynrun.runtime.this_machine import this_machine

    machine, made = with_rpc(this_machine(), settings.rpc), []
    for model in models:
        path = resolve(model).path
        planned, _ = planner_for(path, settings.where(), machine).first()
        made += setups(model, path, placements, planned, bytes_per_s=machine.ram_bytes_per_s, rpc=settings.rpc)
    return machine, made


def _measure(made: list[Setup], tests: Any, limits: Any) -> Bench:
    from dynrun.config import load_config
    from dynrun.runtime.bench import bench
    from dynrun.runtime.bench_result import learn_from

    ticker = Ticker("bench", every_s=15.0)

    def progress(rounds: int, seconds: float, widest: float) -> None:
        noise = f"±{widest:.1%}" if rounds > 1 else "…"
        ticker(seconds, limits.seconds, f"{rounds} rounds, widest interval {noise}")

    found = bench(made, tests, limits, n_threads=load_config().n_threads, on_progress=progress)
    learn_from(made, found)
    return found


def _changes(compare: str | None, before: Result | None, data: Result) -> list[Compared]:
    from dynrun.runtime.bench_history import comparisons

    changes = [] if before is None else comparisons(before, data)
    if compare and not changes:
        say("no earlier bench has a row of this one" if compare == "last" else f"{compare} has no row of this bench")
    return changes


def _show(found: Bench, changes: list[Compared], precision: float) -> None:
    width = max(len(row.model) for row in found.rows)
    print(f"{'model':{width}}  {'placement':10} {'test':12} {'tokens/s':>10} {'95%':>7}  of the memory's bandwidth")
    for row in found.rows:
        half = (row.ci95[1] - row.ci95[0]) / 2 / row.tokens_per_second
        share = f"{row.bandwidth_share:.0%}" if row.bandwidth_share is not None else ""
        speed = f"{row.tokens_per_second:10.2f} {f'±{half:.1%}':>7}"
        print(f"{row.model:{width}}  {row.placement:10} {row.test:12} {speed}  {share}")
    for change in changes:
        low, high = change.change.ci95
        print(
            f"{change.model} {change.placement} {change.test}: {change.before:.2f} → {change.after:.2f} tokens/s, "
            f"{change.change.ratio - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%}): {change.change.verdict}"
        )
    if any(row.noisy for row in found.rows):
        say(f"the time was used up before all intervals were within ±{precision:.0%}: other programs, or --max-seconds")
    if found.drifted and found.drift is not None:
        low, high = found.drift.ci95
        say(
            f"the machine's speed changed by {found.drift.change:+.0%} ({low:+.0%} to {high:+.0%}) meanwhile: it "
            "throttles, or other programs run"
        )


def _types(path: Path, models: list[str] | None, menu: str, settings: Running, as_json: bool) -> None:
    if models:
        raise UsageError("--types measures models of its own", fix="leave the models out")

    from dynrun.config import load_config
    from dynrun.gguf.tensor_types import parse_menu
    from dynrun.runtime.this_machine import this_machine
    from dynrun.runtime.type_speed import measure_types, write_table

    threads, ticker = load_config().n_threads, Ticker("types", every_s=15.0)
    remote = ("-rpc", ",".join(settings.rpc)) if settings.rpc else ()
    found = measure_types(parse_menu(menu), n_threads=threads, options=remote, on_progress=ticker)
    write_table(path, found, this_machine().name, threads)

    def show() -> None:
        for name, value in found.items():
            print(f"{name:8} {value:8.4f} ns a weight")
        say(f"wrote {path}; use it: dynrun make MODEL --speed-table {path} --min-speed 0.95")

    emit(as_json, {"path": str(path), "ns_per_weight": found, "threads": threads}, show)
