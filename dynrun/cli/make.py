"""`dynrun make`: the whole pipeline."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options
from dynrun.cli.allocate import SchemePath, candidates_json, scheme_for, wanted
from dynrun.cli.batch import quants, run_batch
from dynrun.cli.command_line import command_line
from dynrun.cli.convert import Check, TrustCode, prepare, unconverted
from dynrun.cli.fit import fitting
from dynrun.cli.output import StageReporter, candidates_table, emit, megabytes, say
from dynrun.cli.quantize import SplitMaxSize

if TYPE_CHECKING:
    from dynrun.calibration.stage import ImatrixStage
    from dynrun.choose import Chosen
    from dynrun.evaluation.kld import Row
    from dynrun.make import Made, PlannedStage
    from dynrun.scheme import Scheme
    from dynrun.stages import Settings
    from dynrun.target import Target

Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write the file (default: the cache).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show stages, sizes and commands; do nothing.")]
# Lines of the candidates' table; all of them are in `--json`.
_MOST_CANDIDATES = 4


@fitting
@options.allocated
def make(
    model: options.Model,
    settings: Settings,
    quant: options.Quant = None,
    bpw: options.Bpw = None,
    size: options.Size = None,
    out: Out = None,
    probe_tokens: options.ProbeTokens = 1024,
    probe_error: options.ProbeError = 0.01,
    probe_group: options.ProbeGroup = "",
    probe_devices: options.ProbeDevices = "",
    candidates: options.Candidates = 10,
    rounds: options.Rounds = 3,
    eval_tokens: options.EvalTokens = 16384,
    scheme: SchemePath = None,
    split_max_size: SplitMaxSize = None,
    no_feedback: options.NoFeedback = False,
    trust_remote_code: TrustCode = None,
    check: Check = False,
    dry_run: DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Make the best GGUF of the wanted size, and prove it beside the stock preset.

    Killed and run again, it goes on. Example: dynrun make demo --quant Q3_K_M. Several, from safetensors: dynrun make
    ./Qwen3-4B --quant Q2_K,Q4_K_M --out quants/. A fine-tune: dynrun make tuned.gguf --scheme demo-Q3_K_M.scheme.toml
    """
    if dry_run and (first := unconverted(model, trust_remote_code)):
        _show_stages(first, as_json)
        return
    probes = options.probes(probe_tokens, probe_error, probe_group, probe_devices)
    settings = options.choosing(settings, probes, options.search(candidates, rounds), no_feedback)
    settings = replace(settings, eval_tokens=eval_tokens)
    labels, shard_bytes = quants(quant, bpw, size, scheme), max_bytes(split_max_size)
    model = prepare(model, trust_remote_code, check=check, n_files=max(1, len(labels)))
    if len(labels) > 1:
        run_batch(model, labels, settings, out, shard_bytes, dry_run=dry_run, as_json=as_json)
        return
    target = wanted(quant, bpw, size, scheme)
    _run_one(model, target, settings, out, scheme, shard_bytes, dry_run=dry_run, as_json=as_json)


def _run_one(
    model: str,
    target: Target | None,
    settings: Settings,
    out: Path | None,
    scheme: Path | None,
    split_max_size: int | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    known = scheme_for(model, scheme)
    if dry_run:
        _dry_run(model, target, settings, known, split_max_size, as_json)
    else:
        made = run_make(model, target, settings, out, known, split_max_size)
        emit(as_json, to_json(made), lambda: show(made))


def max_bytes(split_max_size: str | None) -> int | None:
    """Of a shard. Raises UsageError."""
    return options.size_bytes(split_max_size) if split_max_size else None


def run_make(
    model: str,
    target: Target | None,
    settings: Settings,
    out: Path | None = None,
    scheme: Scheme | None = None,
    split_max_size: int | None = None,
) -> Made:
    """`make` with its progress on stderr."""
    from dynrun.make import make as make_model

    reporter = StageReporter()
    say(f"log: {reporter.path}")
    made = make_model(
        *(model, target, settings, reporter, reporter.log, out),
        scheme=scheme,
        split_max_size=split_max_size,
        commands=command_line(),
    )
    for note in notes(made.imatrix):
        say(note)
    if made.reference.warning:
        say(f"mind: {made.reference.warning}")
    return made


def notes(imatrix: ImatrixStage) -> list[str]:
    """What people should know of an imatrix."""
    from dynrun.calibration.template import PLAIN_TEXT

    found = []
    if imatrix.template == PLAIN_TEXT:
        found.append("the model has no chat template: plain text was used")
    if imatrix.missing:
        found.append(f"no entry for {len(imatrix.missing)} tensors, the first {imatrix.missing[0]}")
    if imatrix.mtp_missing:
        found.append(f"MTP blocks were not run and keep 4.5 bits per weight or more: {imatrix.mtp_missing}")
    if imatrix.short_experts:
        found.append(
            f"{imatrix.short_experts} of {imatrix.n_experts} experts saw too few tokens (the least "
            f"{imatrix.least_expert_tokens}) and were topped up with their layer's mean"
        )
    return found


def _dry_run(
    model: str,
    target: Target | None,
    settings: Settings,
    scheme: Scheme | None,
    split_max_size: int | None,
    as_json: bool,
) -> None:
    from dynrun.make import plan

    _show_stages(plan(model, target, settings, scheme=scheme, split_max_size=split_max_size), as_json)


def _show_stages(stages: list[PlannedStage], as_json: bool) -> None:
    def show_plan() -> None:
        for stage in stages:
            print(f"{stage.name:13} {'found' if stage.cached else 'to do':6} {stage.detail}")
            if stage.command:
                print(f"{'':20} $ {stage.command}")

    emit(as_json, {"stages": [asdict(stage) for stage in stages]}, show_plan)


def to_json(made: Made) -> dict[str, Any]:
    """What `--json` promises (docs/design.md)."""
    row, other, ratio = made.row, made.baseline_row, made.ratio
    return {
        "file": str(made.file),
        "files": list(map(str, made.files)),
        "scheme": str(made.scheme_path),
        "report": str(made.report.page),
        "card": str(made.report.card),
        "reference": str(made.reference.path),
        "reference_quantized": made.reference.quantized,
        "imatrix": str(made.imatrix.path),
        "size_bytes": made.size_bytes,
        "bpw": row.bpw,
        "predicted_kld": made.scheme.predicted_kld,
        "kld": _kld(row),
        **candidates_json(made.chosen),
        "feedback": feedback_json(made.chosen),
        "baseline": {
            "ftype": made.baseline.ftype,
            "file": str(other.file),
            "size_bytes": other.size_bytes,
            "kld": _kld(other),
        },
        "kld_ratio": None if ratio is None else ratio.value,
        "kld_ratio_ci95": None if ratio is None else list(ratio.ci95),
        "stages": [
            {"name": stage.name, "elapsed_s": round(stage.elapsed_s, 2), "cached": stage.cached}
            for stage in made.stages
        ],
        "elapsed_s": round(made.elapsed_s, 2),
    }


def feedback_json(chosen: Chosen) -> dict[str, Any] | None:
    """What was measured of error feedback, on the probe split; None without."""
    if (found := chosen.rounding) is None:
        return None
    return {
        "kept": found.feedback,
        "except": list(found.plain) if found.feedback else [],
        "kld": found.kld,
        "plain_kld": found.plain_kld,
        "ratio": found.ratio,
        "ratio_ci95": list(found.ratio_ci95),
    }


def feedback_line(chosen: Chosen) -> str:
    """The same for people; "" where it was not tried."""
    if (found := chosen.rounding) is None:
        return ""
    if not found.feedback:
        return "feedback: no better than plain rounding on the selection text, and left out"
    low, high = found.ratio_ci95
    but = f", {' '.join(found.plain)} plain" if found.plain else ""
    return f"feedback: {found.ratio:.3f} ({low:.3f}–{high:.3f}) of plain rounding's KLD, same types{but}"


def _kld(row: Row) -> dict[str, Any]:
    return {"mean": row.kld.mean, "ci95": list(row.kld.ci95), "p99": row.kld.p99, "same_top_p": row.same_top_p}


def show(made: Made) -> None:
    """The candidates, the table, and where the files are."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", justify="left")
    for heading in ("size", "bpw", "mean KLD (95%)", "p99 KLD", "same top p", "PPL"):
        table.add_column(heading, justify="right")
    for name, row in ((f"dynrun {made.scheme.label}", made.row), (f"stock {made.baseline.ftype}", made.baseline_row)):
        low, high = row.kld.ci95
        table.add_row(
            *(name, megabytes(row.size_bytes), f"{row.bpw:.2f}", f"{row.kld.mean:.4f} ({low:.4f}–{high:.4f})"),
            *(f"{row.kld.p99:.3f}", f"{row.same_top_p:.1%}", f"{row.ppl:.2f}"),
        )
    _show_candidates(made)
    console = Console(highlight=False, width=110)
    console.print()
    console.print(table)
    if made.reference.warning:
        console.print(f"\nMind: {made.reference.warning}.")
    if made.ratio is not None:
        low, high = made.ratio.ci95
        console.print(f"\nKLD ratio {made.ratio.value:.3f} ({low:.3f}–{high:.3f}): dynrun's over the stock preset's,")
    predicted = "" if made.scheme.predicted_kld is None else f"; predicted {made.scheme.predicted_kld:.4f}"
    console.print(f"same imatrix, {made.row.n_tokens:,} tokens of conversations not calibrated on{predicted}")
    if line := feedback_line(made.chosen):
        print(line)
    for path in made.files:
        print(f"file    {path}")
    print(f"scheme  {made.scheme_path}")
    print(f"report  {made.report.page}")


def _show_candidates(made: Made) -> None:
    """The best of them: what was measured on the probe split to choose the scheme."""
    search = made.chosen.search
    if not search.trials:
        return
    print(candidates_table(replace(search, trials=search.trials[:_MOST_CANDIDATES])))
    if (n_more := len(search.trials) - _MOST_CANDIDATES) > 0:
        print(f"and {n_more} more, none of them better (--json)")
