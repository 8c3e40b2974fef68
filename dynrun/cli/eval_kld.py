"""`dynrun eval kld`: how far files are from their reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options, tables
from dynrun.cli.output import Ticker, megabytes, say

if TYPE_CHECKING:
    from dynrun.evaluation.continuation import Prompt
    from dynrun.evaluation.kld import Domain, Row
    from dynrun.metrics.intervals import Estimate
    from dynrun.scoring.reference import Progress, Scored

TextNames = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="Score this text as llama-perplexity does, not the test conversations (builtin). Repeatable: "
        "each text gets its own rows.",
    ),
]
Continuations = Annotated[
    int,
    typer.Option("--continuations", metavar="N", min=0, help="Also along 32 greedy tokens behind each of N prompts."),
]


# Smaller means are written with an exponent.
_SMALL = 1e-3


def eval_kld(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="The full-precision model (path or name).")],
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Files made from it, any number.")],
    text: TextNames = None,
    tokens: Annotated[int, typer.Option("--tokens", min=16, help="Tokens to decode at most, of each text.")] = 16384,
    ctx: Annotated[int, typer.Option("--n-ctx", "--ctx", min=16, help="Tokens of one sequence at most.")] = 512,
    continuations: Continuations = 0,
    by_domain: Annotated[
        bool, typer.Option("--domains", help="A table of each text, or of each kind of conversation, as well.")
    ] = False,
    chat_template: options.ChatTemplate = None,
    as_csv: tables.AsCsv = False,
    as_md: tables.AsMarkdown = False,
    as_json: options.AsJson = False,
) -> None:
    """KL divergence from the reference, in nats per token, with its 95% interval.

    Example: dynrun eval kld demo demo:Q3_K_M ./other.gguf --continuations 16
    """
    from dynrun.models import resolve

    form = tables.form_of(as_json, as_csv, as_md)
    base, files = resolve(reference).path, [resolve(model).path for model in models]
    parts, prompts = scored_texts(base, text, chat_template, tokens, ctx, continuations)
    rows, notes = measured(base, files, parts, prompts)
    shown = [kld_table(rows), *([domain_table(rows)] if by_domain or len(text or ()) > 1 else [])]
    if prompts:
        shown.append(continuation_table(rows))
    tables.print_in(form, _data(base, rows, notes), lambda: records(rows), shown)


def scored_texts(
    reference: Path, texts: Sequence[str] | None, chat_template: Path | None, tokens: int, ctx: int, n_prompts: int
) -> tuple[list[Scored], list[Prompt]]:
    """What is scored, and the prompts to continue."""
    from dynrun.calibration.dataset import BUILTIN_NAME
    from dynrun.calibration.template import PLAIN_TEXT
    from dynrun.calibration.text import template_for
    from dynrun.evaluation.continuation import prompts
    from dynrun.evaluation.texts import all_parts
    from dynrun.llamacpp.vocabulary import Vocabulary

    names = list(texts or (BUILTIN_NAME,))
    with Vocabulary.load(reference) as vocabulary, template_for(vocabulary, chat_template) as template:
        parts = all_parts(vocabulary, template, names, max_tokens=tokens, n_ctx=ctx)
        chosen = prompts(vocabulary, template, n=n_prompts, n_ctx=ctx) if n_prompts else []
        if template.origin == PLAIN_TEXT and (chosen or BUILTIN_NAME in names):
            say(f"{reference.name} has no chat template: conversations are scored as plain text")
        return parts, chosen


def measured(
    reference: Path, files: Sequence[Path], parts: Sequence[Scored], prompts: Sequence[Prompt]
) -> tuple[list[Row], list[str]]:
    """A row for each file, and what people should know, which is said at once."""
    from dynrun.config import load_config
    from dynrun.evaluation.checks import checked_headers, notes_on
    from dynrun.evaluation.continuation import continue_along
    from dynrun.evaluation.kld import evaluate
    from dynrun.evaluation.stored_flips import stored_flips
    from dynrun.scoring.reference import ignored_recordings

    config = load_config()
    settings: dict[str, Any] = {
        "n_threads": config.n_threads,
        "n_gpu_layers": config.n_gpu_layers,
        "progress": _progress(),
    }
    checked_headers(reference, files)
    ignored = ignored_recordings(reference, parts)
    notes = [*notes_on(reference, files), *([ignored] if ignored else [])]
    tables.note(notes)
    rows = evaluate(reference, files, parts, **settings)
    if prompts:
        found = continue_along(reference, files, prompts, **settings)
        rows = [replace(row, continuation=one) for row, one in zip(rows, found, strict=True)]
    return [replace(row, flips=stored_flips(reference, row.file)) for row in rows], notes


def _progress() -> Progress:
    tickers: dict[str, Ticker] = {}

    def progress(done: int, total: int, note: str) -> None:
        tickers.setdefault(note, Ticker(note))(done, total, "tokens")

    return progress


def _data(reference: Path, rows: Sequence[Row], notes: Sequence[str]) -> dict[str, Any]:
    listed = [row.to_json() | versus(row, rows[0]) for row in rows]
    return {"reference": str(reference), "rows": listed, "notes": list(notes)}


def versus(row: Row, first: Row) -> dict[str, Any]:
    """The paired comparisons with the first file."""
    ratio = row.ratio_to(first)
    return {
        "ratio_to_first": ratio and ratio.to_json(),
        "difference_to_first": row.difference_to(first).to_json(),
    }


def records(rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
    """A record for each file over all texts, then one for each of its domains, and of its continuation."""
    for row in rows:
        file = {"file": str(row.file), "size_bytes": row.size_bytes, "bpw": row.bpw}
        yield {**file, "domain": "", **row.score.to_json(), **versus(row, rows[0])}
        if len(row.domains) > 1:
            for domain in row.domains:
                yield {**file, "domain": domain.name, **domain.score.to_json()}
        if row.continuation is not None:
            yield {**file, "domain": "continuation", **row.continuation.to_json()}


def kld_table(rows: Sequence[Row]) -> tables.Table:
    """All that is measured of each file, and its ratio to the first."""
    first, several = rows[0], len(rows) > 1
    headings = (
        *("file", "size", "bpw", "mean KLD ±95%", "median", "p90", "p99", "p99.9", "max", "same top p", "RMS Δp"),
        *("PPL", "ln PPL ratio"),
        *(["flips"] if (answered := any(row.flips for row in rows)) else []),
        *(["KLD ratio"] if several else []),
    )
    cells = [
        (*row_cells(row), *([_flips(row)] if answered else []), *([_ratio(row, first)] if several else []))
        for row in rows
    ]
    scored = f"{first.n_tokens:,} tokens scored in {first.score.n_sequences} sequences"
    notes = [f"{scored}; PPL of the reference {first.ppl_reference:.3f}"]
    if answered:
        notes.append("flips: of stored answers, from the reference; r→w from right to wrong, w→r from wrong to right")
    if several:
        notes.append(f"KLD ratio: to {first.file.name}, with the 95% interval on the same sequences")
    return tables.Table(
        headings, tuple(cells), notes=tuple(notes), dispensable=("median", "p90", "p99.9", "max", "ln PPL ratio")
    )


def row_cells(row: Row) -> tuple[str, ...]:
    """A file's numbers as text."""
    kld = row.kld
    return (
        *(row.file.name, megabytes(row.size_bytes), f"{row.bpw:.2f}", mean(kld)),
        *(f"{value:.4f}" for value in (kld.median, kld.p90, kld.p99, kld.p999, kld.max)),
        *(f"{row.same_top_p:.2%}", f"{row.rms_dp:.2%}", f"{row.ppl:.3f}", signed(row.score.ln_ppl_ratio)),
    )


def mean(kld: Any) -> str:
    """A mean KLD (a Summary) with half the width of its interval."""
    half = (kld.ci95[1] - kld.ci95[0]) / 2
    return f"{kld.mean:.5f} ± {half:.5f}" if kld.mean >= _SMALL else f"{kld.mean:.1e} ± {half:.0e}"


def signed(value: Estimate) -> str:
    """A difference with its interval."""
    return f"{value.value:+.4f} ± {(value.ci95[1] - value.ci95[0]) / 2:.4f}"


def domain_table(rows: Sequence[Row]) -> tables.Table:
    """Each text's mean KLD in each file."""
    names = [domain.name for domain in rows[0].domains]
    found: list[tuple[str, ...]] = []
    for i, name in enumerate(names):
        scores: list[Domain] = [row.domains[i] for row in rows]
        found.append((name, f"{scores[0].score.n_tokens:,}", *(mean(domain.score.kld) for domain in scores)))
    return tables.Table(("text", "tokens", *(row.file.name for row in rows)), tuple(found), title="mean KLD by text")


def continuation_table(rows: Sequence[Row]) -> tables.Table:
    """Where the files part from the reference's greedy continuations."""
    found = [(row.file.name, row.continuation) for row in rows if row.continuation is not None]
    cells = [
        (
            *(name, mean(one.score.kld), f"{one.score.same_top_p.value:.2%}"),
            *(f"{one.identical:.0%}", f"{one.median_parted:g}"),
        )
        for name, one in found
    ]
    one = found[0][1]
    return tables.Table(
        ("file", "mean KLD ±95%", "same top p", "identical", "median token where they part"),
        tuple(cells),
        title=f"along {len(one.parted)} greedy continuations of at most {one.n_tokens} tokens",
    )


def _flips(row: Row) -> str:
    cells = [f"{task} {f.share:.1%} ({f.right_to_wrong} r→w, {f.wrong_to_right} w→r)" for task, f in row.flips.items()]
    return ", ".join(cells) or "–"


def _ratio(row: Row, first: Row) -> str:
    ratio = row.ratio_to(first)
    if ratio is None or row is first:
        return "–" if ratio is None else "1"
    return f"{ratio.value:.3f} ({ratio.ci95[0]:.3f}–{ratio.ci95[1]:.3f})"
