"""`dynrun make MODEL --quant A,B,C`: several files of one model, and one report of all."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynrun.cli import options
from dynrun.cli.command_line import command_line
from dynrun.cli.output import StageReporter, emit, megabytes, say
from dynrun.errors import UsageError

if TYPE_CHECKING:
    from dynrun.batch import Batch
    from dynrun.stages import Settings


def quants(quant: str | None, *others: object) -> list[str]:
    """The labels in ``A,B,C``. Raises UsageError for an empty one, and for several where any of ``others`` is given."""
    labels = [label.strip() for label in quant.split(",")] if quant else []
    if not all(labels):
        raise UsageError(f"--quant {quant} has an empty name", fix="write it as Q2_K,Q3_K_M,Q4_K_M")
    if len(labels) > 1 and any(other is not None for other in others):
        raise UsageError("several quants go with none of --bpw, --size and --scheme", fix="leave it out")
    return labels


def run_batch(
    model: str,
    labels: list[str],
    settings: Settings,
    out: Path | None,
    split_max_size: int | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """`make` for all ``labels``, with progress on stderr and the result on stdout."""
    from dynrun.batch import make_batch
    from dynrun.cli.make import notes
    from dynrun.make import plan

    targets = [options.target(label, None, None) for label in labels]
    if dry_run:
        plans = [plan(model, target, settings, split_max_size=split_max_size) for target in targets]
        shown = zip(labels, plans, strict=True)
        data = {"batch": [{"label": label, "stages": [asdict(s) for s in stages]} for label, stages in shown]}
        emit(as_json, data, lambda: _show_plans(data))
        return
    reporter = StageReporter()
    say(f"log: {reporter.path}")
    inputs = (model, targets, settings, reporter, reporter.log, out)
    batch = make_batch(*inputs, split_max_size=split_max_size, commands=command_line())
    for note in notes(batch.made[0].imatrix):
        say(note)
    emit(as_json, to_json(batch), lambda: _show(batch))


def to_json(batch: Batch) -> dict[str, Any]:
    """What `--json` gives of several: each as of one, and what is of all."""
    from dynrun.cli.make import to_json as one_to_json

    return {
        "made": [one_to_json(made) for made in batch.made],
        "imatrix": str(batch.imatrix),
        "report": str(batch.report.page),
        "card": str(batch.report.card),
        "elapsed_s": round(batch.elapsed_s, 2),
    }


def _show(batch: Batch) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", justify="left")
    for heading in ("size", "bpw", "mean KLD (95%)", "stock KLD", "ratio", "same top p", "time"):
        table.add_column(heading, justify="right")
    for made in batch.made:
        row, other, ratio = made.row, made.baseline_row, made.ratio
        low, high = row.kld.ci95
        table.add_row(
            *(made.scheme.label, megabytes(made.size_bytes), f"{row.bpw:.2f}"),
            *(f"{row.kld.mean:.4f} ({low:.4f}–{high:.4f})", f"{other.kld.mean:.4f}"),
            *("" if ratio is None else f"{ratio.value:.3f}", f"{row.same_top_p:.1%}", f"{made.elapsed_s:,.0f} s"),
        )
    console = Console(highlight=False, width=110)
    console.print(table)
    if warning := batch.made[0].reference.warning:
        console.print(f"\nMind: {warning}.")
    for made in batch.made:
        for path in made.files:
            print(f"file    {path}")
    print(f"imatrix {batch.imatrix}")
    print(f"report  {batch.report.page}")


def _show_plans(data: dict[str, Any]) -> None:
    for one in data["batch"]:
        print(f"{one['label']}:")
        for stage in one["stages"]:
            print(f"  {stage['name']:13} {'found' if stage['cached'] else 'to do':6} {stage['detail']}")
