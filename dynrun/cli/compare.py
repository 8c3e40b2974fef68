"""`dynrun compare`: files at equal size, beside the curve of stock presets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options, tables
from dynrun.cli.command_line import command_line
from dynrun.cli.eval_kld import Continuations, TextNames, continuation_table, domain_table, mean, measured, scored_texts
from dynrun.cli.output import StageReporter, megabytes, say
from dynrun.errors import UsageError

if TYPE_CHECKING:
    from dynrun.evaluation.compare import Compared, Comparison, Named
    from dynrun.evaluation.kld import Row
    from dynrun.stages import Settings

CurveFiles = Annotated[
    list[Path] | None,
    typer.Option("--curve", metavar="FILE", help="A stock file of the curve, instead of building them. Repeatable."),
]
Presets = Annotated[
    str,
    typer.Option(
        "--presets",
        metavar="LIST",
        help="Stock presets to build, as Q3_K_M,Q4_K_M, or all (default: two below and two above each file's size).",
    ),
]

ByDomain = Annotated[
    bool, typer.Option("--domains", help="A table of each text, or of each kind of conversation, as well.")
]
ReportFolder = Annotated[
    Path | None, typer.Option("--report", metavar="DIR", help="Write a page, a model card and plots there.")
]


@options.calibrated
def compare(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="The full-precision model (path or name).")],
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Anybody's files of this model.")],
    settings: Settings,
    curve: CurveFiles = None,
    presets: Presets = "",
    text: TextNames = None,
    eval_tokens: Annotated[int, typer.Option("--eval-tokens", min=64, help="Tokens to score, of each text.")] = 16384,
    continuations: Continuations = 0,
    by_domain: ByDomain = False,
    report: ReportFolder = None,
    as_csv: tables.AsCsv = False,
    as_md: tables.AsMarkdown = False,
    as_json: options.AsJson = False,
) -> None:
    """Each file's KLD over the stock presets' at its size, same imatrix: under 1 is better than stock llama.cpp.

    Between presets the curve is interpolated in log KLD against bytes. The presets are made with the imatrix that
    `make` would use, or the one of --imatrix. Example: dynrun compare demo demo:Q3_K_M ./theirs-Q3_K_XL.gguf
    """
    from dynrun.models import resolve

    form = tables.form_of(as_json, as_csv, as_md)
    if curve and presets:
        raise UsageError("--presets are built, and the --curve is given", fix="give one of the two")
    files = [resolve(model).path for model in models]
    stock = _given(resolve(reference).path, curve) if curve else _built(reference, files, presets, settings)
    scored = scored_texts(
        stock.reference, text, settings.chat_template, eval_tokens, settings.eval_n_ctx, continuations
    )
    rows, notes = measured(stock.reference, [*files, *stock.files.values()], *scored)
    found = compared(stock, text or ("builtin",), rows, [*stock.notes, *notes])
    shown = [compared_table(found), curve_table(found)]
    own = rows[: len(files)]
    shown += [domain_table(own)] if by_domain or len(text or ()) > 1 else []
    shown += [continuation_table(own)] if continuations else []
    told = write_comparison(found, reference, report)
    tables.print_in(form, {**found.to_json(), **told}, lambda: _records(found), shown)


def write_comparison(found: Comparison, reference: str, folder: Path | None) -> dict[str, Any]:
    """The report of a comparison, where one is wanted; what `--json` says of it."""
    if folder is None:
        return {"report": None, "card": None, "plots": []}
    from dynrun.models import resolve
    from dynrun.report.compared import compared_report
    from dynrun.report.folder import write_report

    report = compared_report(found, resolve(reference).name, commands=command_line())
    written = write_report(report, folder)
    say(f"report: {written.page}")
    return {"report": str(written.page), "card": str(written.card), "plots": list(map(str, written.plots))}


@dataclass(frozen=True)
class _Stock:
    """The stock ``files`` by label, and the hash of their imatrix where it is known."""

    reference: Path
    files: Mapping[str, Path]
    imatrix_sha256: str | None
    notes: tuple[str, ...] = ()


def _given(reference: Path, curve: Sequence[Path]) -> _Stock:
    """Somebody's stock files; their imatrix is known where all of them say the same."""
    from dynrun.gguf.quant_label import label_of
    from dynrun.gguf.shards import read_whole_header

    if len(curve) < 2:
        raise UsageError("one file makes no curve", fix="give --curve two or more times, of different sizes")
    headers = [read_whole_header(path) for path in curve]
    said = {header.metadata.get("dynrun.imatrix.sha256") for header in headers}
    known = said.pop() if len(said) == 1 else None
    files: dict[str, Path] = {}
    for header in headers:
        path = header.path.resolve()
        if path not in files.values():
            # Several may be of one preset, by several makers.
            names = (label_of(header), header.path.name, str(path))
            files[next(name for name in names if name not in files)] = path
    return _Stock(reference, files, known if isinstance(known, str) else None)


def _built(model: str, files: Sequence[Path], presets: str, settings: Settings) -> _Stock:
    """The stock presets around the files' sizes, made with one imatrix."""
    from dynrun.evaluation.checks import checked_headers
    from dynrun.evaluation.stock_curve import chosen_presets, make_curve
    from dynrun.models import open_reference
    from dynrun.stages import imatrix_stage, read_texts

    reference, reporter = open_reference(model), StageReporter()
    # What is wrong with a file is said before the minutes that an imatrix takes.
    headers = checked_headers(reference.path, files)
    texts = read_texts(reference, settings, reporter)
    imatrix = imatrix_stage(reference, texts, settings, reporter)
    labels = [label for label in presets.replace(" ", "").split(",") if label]
    chosen = chosen_presets(reference, imatrix, [header.file_bytes for header in headers], labels)
    paths = make_curve(
        *(reference, chosen, imatrix),
        n_threads=settings.config.n_threads,
        on_preset=lambda one, i, n: reporter.stage(
            "stock preset", f"{one.ftype}, {one.size_bytes:,} bytes, {i} of {n}"
        ),
    )
    named = {preset.ftype: path for preset, path in zip(chosen, paths, strict=True)}
    quantized = f"the reference was unpacked from {reference.quantized}: divergence is from that"
    return _Stock(reference.path, named, imatrix.sha256, (quantized,) if reference.quantized else ())


def compared(stock: _Stock, texts: Sequence[str], rows: Sequence[Row], notes: Sequence[str]) -> Comparison:
    """The first of ``rows`` against the last, which are the stock files'."""
    from dynrun.evaluation.compare import compare as compare_rows

    n_files = len(rows) - len(stock.files)
    files = [_named(row, "", stock.imatrix_sha256) for row in rows[:n_files]]
    curve = [_named(row, label, stock.imatrix_sha256) for row, label in zip(rows[n_files:], stock.files, strict=True)]
    return compare_rows(stock.reference, texts, files, curve, notes)


def _named(row: Row, label: str, imatrix_sha256: str | None) -> Named:
    from dynrun.evaluation.compare import Named, imatrix_of
    from dynrun.evaluation.stock_curve import imatrix_of_stock
    from dynrun.gguf.shards import read_whole_header, split_name

    metadata = read_whole_header(row.file).metadata
    imatrix = imatrix_of(metadata, imatrix_of_stock(row.file), imatrix_sha256)
    return Named(label or split_name(row.file), row, imatrix)


def _records(found: Comparison) -> Iterable[dict[str, Any]]:
    yield from ({"kind": "file", **row.to_json()} for row in found.rows)
    yield from ({"kind": "stock", **point.to_json()} for point in found.curve)


def compared_table(found: Comparison) -> tables.Table:
    """The files and what each is worth at its size."""
    cells = [
        (
            *(one.label, megabytes(one.row.size_bytes), f"{one.row.bpw:.2f}", mean(one.row.kld)),
            *(f"{one.row.kld.p99:.4f}", f"{one.row.same_top_p:.2%}", f"{one.row.ppl:.3f}"),
            *(_ratio(one), "–" if one.equal_size is None else f"{one.equal_size.curve_kld:.5f}", one.imatrix),
        )
        for one in found.rows
    ]
    notes = [f"equal-size ratio: the file's KLD over the stock curve's at its size ({_text(found)})"]
    if any(one.equal_size and one.equal_size.extrapolated for one in found.rows):
        notes.append("* extrapolated: the file is smaller or larger than every stock file of the curve")
    if any(one.imatrix != "same" for one in found.rows):
        notes.append("imatrix unknown or other: part of the difference may be the imatrix, not the method")
    headings = (
        "file",
        "size",
        "bpw",
        "mean KLD ±95%",
        "p99",
        "same top p",
        "PPL",
        "equal-size ratio",
        "stock KLD here",
    )
    return tables.Table(
        (*headings, "imatrix"), tuple(cells), notes=tuple(notes), dispensable=("bpw", "p99", "PPL", "stock KLD here")
    )


def _text(found: Comparison) -> str:
    return f"{found.rows[0].row.n_tokens:,} tokens of {', '.join(Path(text).name for text in found.texts)}"


def _ratio(one: Compared) -> str:
    if (found := one.equal_size) is None:
        return "–"
    interval = f" ({found.ci95[0]:.3f}–{found.ci95[1]:.3f})" if found.ci95 else ""
    return f"{found.ratio:.3f}{interval}{'*' if found.extrapolated else ''}"


def curve_table(found: Comparison) -> tables.Table:
    """The stock files that make the curve, and those that a smaller one beats."""
    cells = [
        (
            *(point.label, megabytes(point.row.size_bytes), f"{point.row.bpw:.2f}", mean(point.row.kld)),
            *("" if point.on_curve else "beaten by a smaller one", point.imatrix),
        )
        for point in found.curve
    ]
    return tables.Table(("stock preset", "size", "bpw", "mean KLD ±95%", "", "imatrix"), tuple(cells))
