"""`dynrun eval harness`: tasks of lm-evaluation-harness on a GGUF."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options, tables
from dynrun.cli.output import say
from dynrun.errors import UsageError

if TYPE_CHECKING:
    from dynrun.evaluation.harness import HarnessResults, HarnessSettings


def asked(
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="So many questions of each task.")] = None,
    shots: Annotated[
        int | None, typer.Option("--shots", min=0, help="Examples before each question (default: the task's own).")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Give prompts the model's chat template.")] = False,
    include: Annotated[
        Path | None, typer.Option("--include", metavar="DIR", help="A folder with tasks of your own (YAML).")
    ] = None,
    unsafe_code: Annotated[
        bool, typer.Option("--unsafe-code", help="Run the code that the model writes, as HumanEval does. No sandbox!")
    ] = False,
    parallel: Annotated[int, typer.Option("--parallel", min=1, help="Prompts that are answered at once.")] = 4,
    ctx: Annotated[
        int, typer.Option("--n-ctx", "--ctx", min=64, help="Tokens of a prompt and its answer; longer prompts are cut.")
    ] = 4096,
) -> Any:
    """What is asked of the harness, but for the tasks. Raises UsageError."""
    from dynrun.evaluation.harness import HarnessSettings

    if include is not None and not include.is_dir():
        raise UsageError(f"{include} is no folder", fix="check --include")
    return HarnessSettings((), limit, shots, chat, include, unsafe_code, ctx, parallel)


def _eval_harness(
    settings: HarnessSettings,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A path or name.")],
    tasks: Annotated[str, typer.Option("--tasks", metavar="LIST", help="Names of the harness's tasks, with commas.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="All that the harness says, samples too, as JSON.")
    ] = None,
    as_csv: tables.AsCsv = False,
    as_md: tables.AsMarkdown = False,
    as_json: options.AsJson = False,
) -> None:
    """Code, translation and every other task that EleutherAI's lm-evaluation-harness has.

    It needs the extra `dynrun[harness]` and, for most tasks, a network.

    Example: dynrun eval harness demo --tasks gsm8k,wmt16-en-de --limit 50 --chat
    """
    from dynrun.config import load_config
    from dynrun.evaluation.harness import require_harness, run_harness
    from dynrun.models import resolve

    form = tables.form_of(as_json, as_csv, as_md)
    require_harness()
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise UsageError("no tasks", fix="name some: --tasks gsm8k,humaneval")
    settings = replace(settings, tasks=names)
    config, file = load_config(), resolve(model).path
    found = run_harness(file, settings, n_threads=config.n_threads, n_gpu_layers=config.n_gpu_layers, say=say)
    if out is not None:
        found.write(out)
    data = {
        "model": file.name,
        "harness": found.version,
        "tasks": found.tasks,
        "out": None if out is None else str(out),
    }
    tables.print_in(form, data, lambda: _records(found), [_table(found)])


eval_harness = options.with_options(_eval_harness, {"": asked})


def _records(found: HarnessResults) -> Iterator[dict[str, Any]]:
    """A line a metric."""
    for task, metrics in found.tasks.items():
        for name, value in metrics.items():
            if "_stderr" not in name and name != "sample_len":
                # acc has acc_stderr; exact_match,strict-match has exact_match_stderr,strict-match.
                metric, comma, kind = name.partition(",")
                yield {
                    "task": task,
                    "metric": name,
                    "value": value,
                    "stderr": metrics.get(f"{metric}_stderr{comma}{kind}"),
                }


def _table(found: HarnessResults) -> tables.Table:
    rows = tuple(
        (row["task"], row["metric"], f"{row['value']:.4f}", "" if row["stderr"] is None else f"{row['stderr']:.4f}")
        for row in _records(found)
    )
    return tables.Table(("task", "metric", "value", "± stderr"), rows, notes=(f"by lm-eval {found.version}",))
