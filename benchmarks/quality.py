"""How good our schemes are at equal size: beside the stock preset, weighted MSE alone, and random allocations; and what
error feedback gives, on the same types.

usage: .venv/bin/python benchmarks/quality.py MODEL --text NAME=FILE ... --out DIR [--labels L,L] [--methods M,M]
       [--eval-tokens 4096] [--schemes DIR] [--redo M,M] [--keep] [--tokens N] [--probe-tokens N] [--probe-group G]
       [--candidates N]
       .venv/bin/python benchmarks/quality.py --summarize DIR

Methods: ``stock``; ``stock+feedback``, its types rounded with feedback everywhere, as `dynrun quantize --feedback`
does; ``ours``, as `dynrun make` chooses and rounds (or DIR/MODEL-LABEL.scheme.toml, with feedback where that says so);
``ours/plain``, the types of ``ours`` rounded plainly; ``no-feedback``, as `dynrun make --no-feedback`; ``wmse`` and
``wmse-row``, least weighted squared error in absolute units and row by row (quality_methods.py); ``random:N``, N random
allocations; these three rounded plainly. All share one imatrix, collected with the product's default settings. All are
at most as large as the stock preset's file and, but for a line on stderr, at least 99.5% of it; ``stock+feedback``
alone is larger, by a few hundred bytes of our metadata. A covariance is collected only where a method needs it. A text
is UTF-8, cut and scored as llama-perplexity does; NAME=builtin-test is the shipped test conversations.

A row a model, label, method, seed and text goes to DIR/quality.csv as soon as it is known; killed and run again with
the same options it goes on there, and another model may be added to the same DIR. Model files are deleted once
measured, except those that were there before (so may be one that a killed run left) and with --keep; schemes stay in
DIR/schemes. --redo measures some methods of these labels again. At the end, or with --summarize: JSON on standard
output, DIR/quality.md and a plot a model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import quality_rows as rows
from quality_bench import Bench, Method, Narrator, log, named
from quality_files import MadeFile, file_of
from quality_rows import NO_FEEDBACK, OURS, OURS_PLAIN, STOCK, STOCK_FEEDBACK, Cell, method_name
from quality_summary import RANDOM, WMSE, WMSE_ROW, draw, markdown, summarize

from dynrun.allocation.stage import Budget
from dynrun.artifacts import MANIFEST, discard, file_lock, write_json, write_text
from dynrun.calibration.text import template_for
from dynrun.config import load_config
from dynrun.errors import DynrunError, UsageError
from dynrun.evaluation.kld import evaluate
from dynrun.evaluation.texts import conversation_parts, read_text, text_parts
from dynrun.llamacpp.vocabulary import Vocabulary
from dynrun.models import Reference, open_reference
from dynrun.quantize import Preset
from dynrun.scoring.reference import Scored
from dynrun.stages import Settings, covariance_stage, imatrix_stage, job_for, read_texts
from dynrun.target import Target, budget_for

N_CTX = 512
LABELS = "IQ2_XXS,IQ2_M,Q2_K,IQ3_XXS,Q3_K_M,IQ4_XS,Q4_K_M,Q5_K_M"
# What is known first is most useful; the plain file takes its types from the one before.
_ORDER = (STOCK, STOCK_FEEDBACK, OURS, OURS_PLAIN, NO_FEEDBACK, WMSE, WMSE_ROW, RANDOM)
METHODS = f"{','.join(_ORDER)}:5"
BUILTIN_TEST = "builtin-test"


def measure(bench: Bench, budget: Budget, preset: Preset, method: Method, texts: Sequence[str]) -> None:
    """Make one file, measure it on ``texts``, a row each, and delete it."""
    made = file_of(bench, budget, preset, method)
    for text in texts:
        cell = beside_stock(bench.out, measured(bench, budget, method, text, made))
        rows.append(bench.out, cell)
        beside = "" if cell.kld_ratio is None else f", {cell.kld_ratio:.3f} of stock"
        log(f"  {budget.label} {cell.name} on {text}: {cell.bytes:,} bytes, KLD {cell.kld:.5f}{beside}")
    # What was there before this run is somebody else's.
    if not bench.keep and not made.file.outcome.cached:
        discard(made.file.path.parent, MANIFEST)


def measured(bench: Bench, budget: Budget, method: Method, text: str, made: MadeFile) -> Cell:
    """The cell of a file on one text, without its ratio to stock."""
    begun, config = time.monotonic(), bench.settings.config
    (row,) = evaluate(
        bench.reference.path,
        [made.file.path],
        bench.parts[text],
        n_threads=config.n_threads,
        n_gpu_layers=config.n_gpu_layers,
    )
    return Cell(
        model=bench.reference.name,
        label=budget.label,
        method=method[0],
        seed=method[1],
        text=text,
        bytes=row.size_bytes,
        budget_bytes=budget.size_bytes,
        bpw=row.bpw,
        kld=row.kld.mean,
        kld_low=row.kld.ci95[0],
        kld_high=row.kld.ci95[1],
        same_top_p=row.same_top_p,
        predicted_kld=made.predicted_kld,
        made_s=round(made.seconds, 1),
        rounded_s=None if made.rounded_s is None else round(made.rounded_s, 1),
        seconds=round(time.monotonic() - begun, 1),
        key=bench.key(text),
        sums=row.clusters.sums,
        counts=row.clusters.counts,
    )


def beside_stock(out: Path, cell: Cell) -> Cell:
    """``cell`` with its ratio to the stock cell where that is known."""
    place = (cell.model, cell.label, STOCK, None, cell.text)
    stock = cell if cell.place == place else next((one for one in rows.load(out) if one.place == place), None)
    ratio = cell.ratio_to(stock) if stock else None
    if ratio is None:
        return cell
    return replace(cell, kld_ratio=ratio.value, ratio_low=ratio.ci95[0], ratio_high=ratio.ci95[1])


def run(bench: Bench, labels: Sequence[str], methods: Sequence[Method]) -> list[str]:
    """Measure what is missing, label by label; what failed, a line each."""
    failures = []
    for label in labels:
        todo = [(method, texts) for method in methods if (texts := bench.missing(label, method))]
        if not todo:
            continue
        try:
            budget, preset = budget_for(bench.reference, bench.imatrix, Target(quant=label))
        except DynrunError as error:
            failures.append(f"{label}: {error}")
            continue
        for method, texts in todo:
            log(f"{label} {method_name(*method)}")
            try:
                measure(bench, budget, preset, method, texts)
            except DynrunError as error:
                failures.append(f"{label} {method_name(*method)}: {error}")
                log(f"  {error}")
    return failures


def open_bench(options: argparse.Namespace, methods: Sequence[Method], stack: ExitStack) -> Bench:
    """Tokenize the texts, collect the imatrix."""
    reference, settings = open_reference(options.model), settings_of(options)
    parts = {name: parts_of(reference, spec, options.eval_tokens) for name, spec in options.text}
    texts = read_texts(reference, settings, Narrator())
    # A scheme of --schemes may say that it is to be rounded plainly.
    with_feedback = {STOCK_FEEDBACK, OURS, OURS_PLAIN} if options.schemes is None else {STOCK_FEEDBACK}
    needed = any(name in with_feedback for name, _ in methods)
    if needed and not job_for(reference, texts, settings, Narrator()).folder("imatrix").complete:
        # Both from one pass. Where the imatrix is there already, the first file that needs the covariance collects it.
        covariance_stage(reference, texts, settings, Narrator())
    imatrix = imatrix_stage(reference, texts, settings, Narrator())
    return Bench(reference, imatrix, texts, parts, settings, options.out, options.schemes, options.keep, stack)


def settings_of(options: argparse.Namespace) -> Settings:
    """The product's defaults, but for what the options of the same names say: large models take long."""
    settings = Settings(config=load_config())
    return replace(
        settings,
        imatrix=replace(settings.imatrix, n_tokens=options.tokens or settings.imatrix.n_tokens),
        probes=replace(
            settings.probes, n_tokens=options.probe_tokens or settings.probes.n_tokens, group=options.probe_group
        ),
        search=replace(
            settings.search,
            n_candidates=settings.search.n_candidates if options.candidates is None else options.candidates,
        ),
    )


def parts_of(reference: Reference, spec: str, n_tokens: int) -> list[Scored]:
    """What is scored of one text."""
    with Vocabulary.load(reference.path) as vocabulary:
        if spec != BUILTIN_TEST:
            return text_parts(vocabulary, read_text(Path(spec)), max_tokens=n_tokens, n_ctx=N_CTX)
        with template_for(vocabulary) as template:
            return conversation_parts(vocabulary, template, max_tokens=n_tokens, n_ctx=N_CTX)


def report(out: Path) -> None:
    """Print the summary, write the table and the plots."""
    cells = rows.load(out)
    if not cells:
        raise UsageError(f"{out} holds no {rows.CSV_FILE} with rows", fix="measure first")
    summary: dict[str, Any] = summarize(cells)
    write_text(out / "quality.md", markdown(cells, summary))
    for model, found in summary["models"].items():
        found["plot"] = str(out / f"quality-{model}.png")
        draw([cell for cell in cells if cell.model == model], Path(found["plot"]))
    summary["table"] = str(out / "quality.md")
    write_json(out / "quality.json", summary)
    print(json.dumps(summary, indent=1))


def methods_of(text: str) -> list[Method]:
    """``stock,random:2`` as pairs of name and seed, in the order that is useful early. Raises UsageError."""
    found: list[Method] = []
    for spec in text.split(","):
        name, _, number = spec.partition(":")
        if name not in _ORDER or bool(number) != (name == RANDOM) or (number and not number.isdecimal()):
            raise UsageError(f"no method {spec!r}", fix=f"some of {METHODS}")
        found += [(name, seed) for seed in range(int(number))] if number else [(name, None)]
    return sorted(found, key=lambda method: (_ORDER.index(method[0]), method[1] or 0))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--summarize", type=Path, metavar="DIR")
    parser.add_argument("--labels", default=LABELS)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--text", action="append", type=named, default=[], metavar="NAME=FILE")
    parser.add_argument("--eval-tokens", type=int, default=4096)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--probe-tokens", type=int)
    parser.add_argument("--probe-group", default="")
    parser.add_argument("--candidates", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--schemes", type=Path)
    parser.add_argument("--redo", default="", metavar="METHODS")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    if not options.summarize and not (options.model and options.out and options.text):
        parser.error("give MODEL, --out and at least one --text, or --summarize DIR")
    return options


def main() -> int:
    """Run it; the exit code is not 0 where something could not be measured."""
    options = _options()
    try:
        if options.summarize:
            report(options.summarize)
            return 0
        methods = methods_of(options.methods)
        options.out.mkdir(parents=True, exist_ok=True)
        # Standard output is for the summary alone.
        waiting = f"waiting for another run in {options.out}"
        with redirect_stdout(sys.stderr), file_lock(options.out / ".lock", waiting=waiting), ExitStack() as stack:
            bench, labels = open_bench(options, methods, stack), options.labels.split(",")
            rows.drop(options.out, bench.reference.name, labels, options.redo.split(","))
            failures = run(bench, labels, methods)
        report(options.out)
    except DynrunError as error:
        log(f"quality: {error}")
        return error.exit_code
    for failure in failures:
        log(f"not measured: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
