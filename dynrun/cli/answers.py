"""What `eval mmlu`, `eval task` and `eval flips` share: running models over a task, and the tables of answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli.output import Ticker, megabytes, say

if TYPE_CHECKING:
    from rich.table import Table

    from dynrun.evaluation.questions import Task
    from dynrun.evaluation.runs import Run
    from dynrun.metrics.accuracy import Accuracy
    from dynrun.metrics.flips import Flips

Models = Annotated[
    list[str],
    typer.Argument(metavar="MODEL...", help="Paths or names; flips are counted from the first to each other."),
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="So many questions, spread evenly over the subjects.")
]
Ctx = Annotated[
    int, typer.Option("--n-ctx", "--ctx", min=64, help="Tokens of one prompt at most; longer ones lose shots.")
]
BySubject = Annotated[bool, typer.Option("--by-subject", help="Also print the accuracy of each subject.")]


def run_models(models: list[str], task: Task, n_ctx: int) -> list[Run]:
    """A run of each model, all resolved before the first minute is spent."""
    from dynrun.config import load_config
    from dynrun.evaluation.runs import run_task
    from dynrun.models import resolve

    config = load_config()
    files = [resolve(model).path for model in models]
    return [
        run_task(
            file,
            task,
            n_ctx=n_ctx,
            n_threads=config.n_threads,
            n_gpu_layers=config.n_gpu_layers,
            progress=_progress(file),
        )
        for file in files
    ]


def _progress(file: Path) -> Any:
    ticker = Ticker(file.name)
    return lambda done, total: ticker(done, total, "questions")


def data_of(runs: list[Run]) -> dict[str, Any]:
    """The first run's fields, and all runs in ``rows`` with their flips from the first."""
    from dynrun.evaluation.runs import flips

    rows = [run.to_json() | {"flips": None if run is runs[0] else flips(runs[0], run).to_json()} for run in runs]
    return {**rows[0], "rows": rows}


def show_runs(runs: list[Run], by_subject: bool) -> None:
    """Accuracy of each run, flips from the first, and what to know about the numbers."""
    from dynrun.evaluation.runs import flips

    first, several = runs[0], len(runs) > 1
    efficient = first.efficiency is not None
    headings = ["size", "accuracy (95%)"]
    headings += ["flips (95%)", "right→wrong", "wrong→right"] if several else []
    headings += ["efficiency /GiB (/GB)"] if efficient else []
    table = new_table("file", headings)
    for run in runs:
        changed = flip_cells(flips(first, run)) if run is not first else ["–"] * 3
        gained = run.efficiency
        cells = [megabytes(run.size_bytes), accuracy_cell(run.accuracy()), *(changed if several else [])]
        table.add_row(run.model, *cells, *([f"{gained.per_gib:,.2f} ({gained.per_gb:,.2f})"] if gained else []))
    show_table(table)
    if by_subject:
        _show_subjects(runs)
    _show_notes(runs)


def _show_subjects(runs: list[Run]) -> None:
    table = new_table("subject", ["questions", *(run.model for run in runs)])
    for subject, found in runs[0].subjects.items():
        table.add_row(subject, str(found.questions), *(accuracy_cell(run.subjects[subject]) for run in runs))
    print()
    show_table(table)


def _show_notes(runs: list[Run]) -> None:
    first = runs[0]
    asked = f"{len(first.answers):,} questions of {first.task}"
    print(f"\n{asked}, answers by {first.score}; guessing gives {first.chance:.1%}")
    for run in runs:
        low, high = run.accuracy().ci95
        if low <= run.chance <= high:
            print(f"{run.model} is not told from guessing: the interval includes {run.chance:.1%}")
        if run.shortened:
            print(f"{run.model}: {run.shortened:,} prompts were longer than the context and lost shots")
    if first.efficiency is not None:
        print("efficiency: (accuracy in % − 25) / size; published figures are per GiB, though labelled GB")
    for run in runs:
        say(f"answers of {run.model}: {run.path}")


def accuracy_cell(found: Accuracy) -> str:
    """``45.2% (41.2–49.3)``."""
    low, high = found.ci95
    return f"{found.value:.1%} ({100 * low:.1f}–{100 * high:.1f})"


def flip_cells(found: Flips) -> list[str]:
    """The share with its interval, and both directions in questions."""
    low, high = found.ci95
    share = f"{found.share:.1%} ({100 * low:.1f}–{100 * high:.1f})"
    return [share, str(found.right_to_wrong), str(found.wrong_to_right)]


def new_table(first: str, headings: list[str]) -> Table:
    """A plain table; all columns but the first are numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def show_table(table: Table) -> None:
    """On a terminal in its width, else in one that no cell is wrapped in."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)
