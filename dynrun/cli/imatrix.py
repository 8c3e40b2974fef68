"""`dynrun imatrix`: the importance matrix alone, and what is in it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options
from dynrun.cli.make import notes
from dynrun.cli.output import StageReporter, emit, say

if TYPE_CHECKING:
    from dynrun.calibration.stage import CovarianceStage, ImatrixStage
    from dynrun.models import Reference
    from dynrun.stages import Settings

    _Collected = tuple[ImatrixStage, CovarianceStage | None]


@options.calibrated
def imatrix(
    model: options.Model,
    settings: Settings,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Copy the imatrix here too.")] = None,
    covariance: Annotated[
        bool, typer.Option("--covariance", help="Collect the covariance of the weights' inputs as well.")
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print what is in it, as llama-imatrix --show-statistics, and draw it.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="The drawing's file (default: NAME-imatrix.png here).")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Collect the importance matrix on chat-templated conversations, in llama.cpp's GGUF format.

    With --imatrix FILE nothing is collected: the file is checked against the model, converted, merged with others.
    Example: dynrun imatrix demo --out demo.imatrix.gguf --stats
    """
    from dynrun.artifacts import link_or_copy
    from dynrun.models import open_reference

    reference = open_reference(model)
    made, matrices = _collect(reference, settings, covariance)
    if out is not None:
        link_or_copy(made.path, out)
    for note in notes(made):
        say(note)
    data = _data(made, out or made.path, matrices)
    if stats or plot is not None:
        drawing = plot or Path(f"{reference.name}-imatrix.png")
        found = _statistics(made.path, drawing, settings.imatrix.min_expert_tokens)
        emit(as_json, {**data, **found, "plot": str(drawing)}, lambda: _show_statistics(found, drawing))
    else:
        emit(as_json, data, lambda: _show(made, out or made.path, matrices))


def _collect(reference: Reference, settings: Settings, covariance: bool) -> _Collected:
    from dynrun.calibration.stage import make_covariance
    from dynrun.stages import imatrix_stage, job_for, read_texts

    reporter = StageReporter()
    texts = read_texts(reference, settings, reporter)
    matrices = None
    if covariance:
        # First, as its first pass gives the imatrix too.
        reporter.stage("covariance", f"{settings.imatrix.n_tokens:,} tokens of {texts.name}")
        matrices = make_covariance(job_for(reference, texts, settings, reporter))
    return imatrix_stage(reference, texts, settings, reporter), matrices


def _data(made: ImatrixStage, path: Path, matrices: CovarianceStage | None) -> dict[str, Any]:
    data = {
        "path": str(path),
        "sha256": made.sha256,
        "dataset": made.dataset,
        "tokens": made.n_tokens,
        "sequences": made.n_sequences,
        "tokens_per_second": made.tokens_per_second,
        "template": made.template,
        "missing": list(made.missing),
        "experts": made.n_experts,
        "short_experts": made.short_experts,
        "least_expert_tokens": made.least_expert_tokens,
        "cached": made.outcome.cached,
        "elapsed_s": round(made.outcome.elapsed_s, 2),
    }
    if matrices is not None:
        data["covariance"] = {
            "path": str(matrices.covariance.folder),
            "passes": matrices.n_passes,
            "tokens_per_second": matrices.tokens_per_second,
            "elapsed_s": round(matrices.outcome.elapsed_s, 2),
        }
    return data


def _show(made: ImatrixStage, path: Path, matrices: CovarianceStage | None) -> None:
    print(f"{path}\n{made.n_sequences} sequences, {made.n_tokens:,} tokens of {made.dataset}")
    if matrices is not None:
        print(f"covariance: {matrices.covariance.folder}, {matrices.n_passes} passes")


def _statistics(path: Path, drawing: Path, min_tokens: int) -> dict[str, Any]:
    from dynrun.calibration.experts import coverage
    from dynrun.calibration.imatrix import read_imatrix
    from dynrun.calibration.imatrix_plot import draw
    from dynrun.calibration.imatrix_stats import layer_statistics, statistics

    imatrix = read_imatrix(path)
    rows = statistics(imatrix)
    draw(imatrix, drawing, min_tokens=min_tokens)
    return {
        "statistics": [asdict(row) for row in rows],
        "layers": [asdict(row) for row in layer_statistics(rows)],
        "coverage": [asdict(group) for group in coverage(imatrix, min_tokens=min_tokens)],
    }


def _show_statistics(found: dict[str, Any], drawing: Path) -> None:
    """The columns of llama-imatrix's table, then its layers, then the experts."""
    print(
        f"{'layer':>6} {'tensor':>24} {'Σ(Act²)':>14} {'min':>12} {'max':>12} {'µ':>12} {'σ':>12} {'% active':>9} "
        f"{'N':>8} {'entropy':>9} {'E (norm)':>9} {'ZD':>8} {'CosSim':>8}"
    )
    for row in found["statistics"]:
        block = "-" if row["block"] is None else row["block"]
        print(
            f"{block:>6} {row['tensor']:>24} {row['total']:>14.2f} {row['least']:>12.4f} {row['greatest']:>12.4f} "
            f"{row['mean']:>12.2f} {row['stddev']:>12.2f} {row['active']:>9.2%} {row['n']:>8} {row['entropy']:>9.4f} "
            f"{row['entropy_share']:>9.2%} {row['zd']:>8.2%} {row['cos_sim']:>8.4f}"
        )
    print(f"\n{'layer':>6} {'Σ(Act²)':>14} {'ZD':>8} {'CosSim':>8}")
    for row in found["layers"]:
        print(f"{row['block']:>6} {row['total']:>14.2f} {row['zd']:>8.2%} {row['cos_sim']:>8.4f}")
    if found["coverage"]:
        print(f"\n{'layer':>6} {'experts':>8} {'least':>10} {'median':>10} {'unseen':>7} {'short':>6}  weights")
    for row in found["coverage"]:
        print(
            f"{'-' if row['block'] is None else row['block']:>6} {len(row['tokens']):>8} {row['least']:>10,} "
            f"{row['median']:>10,.0f} {row['unseen']:>7} {row['short']:>6}  {', '.join(row['weights'])}"
        )
    print(f"\n{drawing}")
