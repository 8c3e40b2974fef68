"""What `eval mmlu`, `eval task` and `eval flips` share: running models over a task, and the tables of answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli.output import Ticker, megabytes, say
from dynrun.cli.tables import Table

if TYPE_CHECKING:
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


def records(runs: list[Run], by_subject: bool) -> Iterator[dict[str, Any]]:
    """For CSV: a line a run, and with ``by_subject`` a line for each subject before it."""
    for row in data_of(runs)["rows"]:
        subjects, about = row.pop("subjects"), {key: row[key] for key in ("task", "model")}
        for subject, found in subjects.items() if by_subject else ():
            yield {**about, "subject": subject, **found}
        # A task has other settings and scores than another, the columns are the same.
        yield {**about, "subject": "", **{key: row[key] for key in row if key not in ("settings", "scores", "run")}}


def run_tables(runs: list[Run], by_subject: bool) -> list[Table]:
    """Accuracy of each run, flips from the first, and what to know about the numbers; then each subject."""
    from dynrun.evaluation.runs import flips

    first, several = runs[0], len(runs) > 1
    headings = ["file", "size", "accuracy (95%)"]
    headings += ["flips (95%)", "right→wrong", "wrong→right"] if several else []
    headings += ["efficiency /GiB (/GB)"] if first.efficiency is not None else []
    rows = []
    for run in runs:
        changed = flip_cells(flips(first, run)) if run is not first else ["–"] * 3
        gained = run.efficiency
        cells = [megabytes(run.size_bytes), accuracy_cell(run.accuracy()), *(changed if several else [])]
        rows.append((run.model, *cells, *([f"{gained.per_gib:,.2f} ({gained.per_gb:,.2f})"] if gained else [])))
    whole = Table(tuple(headings), tuple(rows), notes=tuple(_notes(runs)))
    return [whole, *([_subjects(runs)] if by_subject else [])]


def _subjects(runs: list[Run]) -> Table:
    rows = [
        (subject, str(found.questions), *(accuracy_cell(run.subjects[subject]) for run in runs))
        for subject, found in runs[0].subjects.items()
    ]
    return Table(("subject", "questions", *(run.model for run in runs)), tuple(rows))


def _notes(runs: list[Run]) -> Iterator[str]:
    first = runs[0]
    asked = f"{len(first.answers):,} questions of {first.task}"
    yield f"{asked}, answers by {first.score}; guessing gives {first.chance:.1%}"
    for run in runs:
        low, high = run.accuracy().ci95
        if low <= run.chance <= high:
            yield f"{run.model} is not told from guessing: the interval includes {run.chance:.1%}"
        if run.shortened:
            yield f"{run.model}: {run.shortened:,} prompts were longer than the context and lost shots"
    if first.efficiency is not None:
        yield "efficiency: (accuracy in % − 25) / size; published figures are per GiB, though labelled GB"


def say_where(runs: list[Run]) -> None:
    """Where the answers lie, for `eval flips`."""
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
