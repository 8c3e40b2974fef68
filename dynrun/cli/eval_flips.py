"""`dynrun eval flips`: which answers changed between two stored runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import answers, options, tables

if TYPE_CHECKING:
    from dynrun.evaluation.runs import Run
    from dynrun.metrics.flips import Flips

_RUN = "A run.json that `eval mmlu` or `eval task` wrote, or a model: then all its stored runs."


def eval_flips(
    first: Annotated[str, typer.Argument(metavar="RUN_A", help=_RUN)],
    second: Annotated[str, typer.Argument(metavar="RUN_B", help="The same of the other model.")],
    as_csv: tables.AsCsv = False,
    as_md: tables.AsMarkdown = False,
    as_json: options.AsJson = False,
) -> None:
    """Flips between two models' stored answers (arXiv 2407.09141): right to wrong and wrong to right.

    Nothing is computed: run `eval mmlu` or `eval task` on both models before.

    Example: dynrun eval flips demo demo:Q3_K_M
    """
    from dynrun.errors import NotFoundError
    from dynrun.evaluation.runs import comparable, flips

    form = tables.form_of(as_json, as_csv, as_md)
    pairs = comparable(_runs(first), _runs(second))
    if not pairs:
        raise NotFoundError(
            f"{first} and {second} have no stored runs of the same task and settings",
            fix="run `dynrun eval mmlu` or `dynrun eval task` on both",
        )
    found = [(one, other, flips(one, other)) for one, other in pairs]
    rows = [_row(*row) for row in found]
    tables.print_in(form, {"rows": rows}, lambda: map(_record, rows), [_table(found)])


def _runs(text: str) -> list[Run]:
    from dynrun.evaluation.runs import read_run, runs_of
    from dynrun.models import resolve

    path = Path(text).expanduser()
    return [read_run(path)] if path.suffix == ".json" else runs_of(resolve(text).path)


def _row(first: Run, second: Run, found: Flips) -> dict[str, Any]:
    return {
        "task": first.task,
        "settings": dict(first.settings),
        "first": {"model": first.model, "run": str(first.path)},
        "second": {"model": second.model, "run": str(second.path)},
        **found.to_json(),
    }


def _record(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "settings"}


def _table(found: list[tuple[Run, Run, Flips]]) -> tables.Table:
    rows = []
    for first, second, one in found:
        cells = (f"{one.questions:,}", *answers.flip_cells(one), str(one.changed), f"{one.p_value:.3f}")
        rows.append((f"{first.task}: {first.model} → {second.model}", *cells))
    return tables.Table(
        ("task", "questions", "flips (95%)", "right→wrong", "wrong→right", "changed", "p"),
        tuple(rows),
        notes=("changed: also from one wrong answer to another; p: McNemar's exact test that neither model is better",),
    )
