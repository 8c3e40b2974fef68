"""`dynrun eval mmlu`: MMLU 5-shot."""

from __future__ import annotations

from typing import Annotated

import typer

from dynrun.cli import answers, options, tables


def eval_mmlu(
    models: answers.Models,
    data: Annotated[
        str,
        typer.Option(
            "--data", metavar="DIR", help="Folder with dev and test (CSV, or Parquet of cais/mmlu), or hf:cais/mmlu."
        ),
    ],
    limit: answers.Limit = None,
    shots: Annotated[int, typer.Option("--shots", min=0, help="Answered examples before each question.")] = 5,
    answer_prefix: Annotated[
        str,
        typer.Option("--answer-prefix", metavar="TEXT", help='Begins each answer: Llama 3 wants "The best answer is".'),
    ] = "",
    ctx: answers.Ctx = 4096,
    by_subject: answers.BySubject = False,
    as_csv: tables.AsCsv = False,
    as_md: tables.AsMarkdown = False,
    as_json: options.AsJson = False,
) -> None:
    """Accuracy on MMLU with its 95% interval, flips between files, and efficiency.

    Prompts are those of the benchmark's authors; a letter counts with and without a leading space.

    Example: dynrun eval mmlu demo demo:Q3_K_M --data mmlu --limit 570
    """
    from dynrun.evaluation.mmlu import mmlu

    form = tables.form_of(as_json, as_csv, as_md)
    task = mmlu(data, shots=shots, answer_prefix=answer_prefix).limited(limit)
    runs = answers.run_models(models, task, ctx)
    shown = answers.run_tables(runs, by_subject)
    tables.print_in(form, answers.data_of(runs), lambda: answers.records(runs, by_subject), shown)
    answers.say_where(runs)
