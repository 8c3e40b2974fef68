"""`dynrun eval task`: other multiple-choice benchmarks."""

from __future__ import annotations

from typing import Annotated

import typer

from dynrun.cli import answers, options, tables


def eval_task(
    name: Annotated[str, typer.Argument(metavar="NAME", help="mmlu-pro, arc, hellaswag or winogrande.")],
    models: answers.Models,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="FILE",
            help="JSON lines, JSON, Parquet or CSV; for hellaswag also llama-perplexity's text; or hf:owner/name.",
        ),
    ],
    limit: answers.Limit = None,
    dev: Annotated[
        str | None, typer.Option("--dev", metavar="FILE", help="Where examples for --shots come from.")
    ] = None,
    shots: Annotated[int, typer.Option("--shots", min=0, help="Answered examples before each question.")] = 0,
    ctx: answers.Ctx = 4096,
    by_subject: answers.BySubject = False,
    as_csv: tables.AsCsv = False,
    as_md: tables.AsMarkdown = False,
    as_json: options.AsJson = False,
) -> None:
    """Accuracy on a multiple-choice benchmark with its 95% interval, and flips between files.

    Asked as lm-evaluation-harness asks: arc and hellaswag by likelihood per character, winogrande by likelihood,
    mmlu-pro by the letter, without a chain of thought.

    Example: dynrun eval task hellaswag demo demo:Q3_K_M --data hellaswag_val_full.txt --limit 400
    """
    from dynrun.evaluation.tasks import task

    form = tables.form_of(as_json, as_csv, as_md)
    asked = task(name, data, dev=dev, shots=shots).limited(limit)
    runs = answers.run_models(models, asked, ctx)
    shown = answers.run_tables(runs, by_subject)
    tables.print_in(form, answers.data_of(runs), lambda: answers.records(runs, by_subject), shown)
    answers.say_where(runs)
