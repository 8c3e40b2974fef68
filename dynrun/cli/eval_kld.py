"""`dynrun eval kld`: how far files are from their reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options
from dynrun.cli.output import Ticker, emit, megabytes, say

if TYPE_CHECKING:
    from dynrun.evaluation.kld import Row
    from dynrun.scoring.reference import Scored


def eval_kld(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="The full-precision model (path or name).")],
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Files made from it, any number.")],
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Score this text as llama-perplexity does, not the test conversations."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=16, help="Tokens to decode at most.")] = 16384,
    ctx: Annotated[int, typer.Option("--n-ctx", "--ctx", min=16, help="Tokens of one sequence at most.")] = 512,
    chat_template: options.ChatTemplate = None,
    as_json: options.AsJson = False,
) -> None:
    """KL divergence from the reference, in nats per token, with its 95% interval.

    Example: dynrun eval kld demo demo:Q3_K_M ./other.gguf
    """
    from dynrun.config import load_config
    from dynrun.evaluation.kld import evaluate
    from dynrun.models import resolve

    config = load_config()
    base = resolve(reference).path
    files = [resolve(model).path for model in models]
    parts = _parts(base, text, chat_template, tokens, ctx)
    tickers: dict[str, Ticker] = {}

    def progress(done: int, total: int, note: str) -> None:
        tickers.setdefault(note, Ticker(note))(done, total, "tokens")

    rows = evaluate(base, files, parts, n_threads=config.n_threads, n_gpu_layers=config.n_gpu_layers, progress=progress)
    emit(as_json, _data(base, rows), lambda: _show(rows))


def _parts(reference: Path, text: Path | None, chat_template: Path | None, tokens: int, ctx: int) -> list[Scored]:
    from dynrun.calibration.template import PLAIN_TEXT
    from dynrun.calibration.text import template_for
    from dynrun.evaluation.texts import conversation_parts, read_text, text_parts
    from dynrun.llamacpp.vocabulary import Vocabulary

    content = None if text is None else read_text(text)
    with Vocabulary.load(reference) as vocabulary:
        if content is not None:
            return text_parts(vocabulary, content, max_tokens=tokens, n_ctx=ctx)
        with template_for(vocabulary, chat_template) as template:
            if template.origin == PLAIN_TEXT:
                say(f"{reference.name} has no chat template: conversations are scored as plain text")
            return conversation_parts(vocabulary, template, max_tokens=tokens, n_ctx=ctx)


def _data(reference: Path, rows: list[Row]) -> dict[str, Any]:
    listed = []
    for row in rows:
        ratio = row.ratio_to(rows[0])
        listed.append(
            {
                **row.to_json(),
                "ratio_to_first": None if ratio is None else {"value": ratio.value, "ci95": list(ratio.ci95)},
            }
        )
    return {"reference": str(reference), "rows": listed}


def _show(rows: list[Row]) -> None:
    import sys

    from rich.console import Console
    from rich.table import Table

    several = len(rows) > 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("file", overflow="fold")
    headings = ("size", "bpw", "mean KLD ±95%", "p99", "same top p", "RMS Δp", "PPL", "KLD ratio")
    for heading in headings if several else headings[:-1]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*_cells(row), *([_ratio(row, rows[0])] if several else []))
    # A pipe has no width; rich would take 80 columns and wrap every cell.
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    console.print(f"\n{rows[0].n_tokens:,} tokens scored; PPL of the reference {rows[0].ppl_reference:.3f}")
    if several:
        console.print(f"KLD ratio: to {rows[0].file.name}, with the 95% interval on the same sequences")


def _cells(row: Row) -> list[str]:
    low, high = row.kld.ci95
    return [
        row.file.name,
        megabytes(row.size_bytes),
        f"{row.bpw:.2f}",
        f"{row.kld.mean:.5f} ± {(high - low) / 2:.5f}",
        f"{row.kld.p99:.4f}",
        f"{row.same_top_p:.2%}",
        f"{row.rms_dp:.2%}",
        f"{row.ppl:.3f}",
    ]


def _ratio(row: Row, first: Row) -> str:
    ratio = row.ratio_to(first)
    if ratio is None or row is first:
        return "–" if ratio is None else "1"
    return f"{ratio.value:.3f} ({ratio.ci95[0]:.3f}–{ratio.ci95[1]:.3f})"
