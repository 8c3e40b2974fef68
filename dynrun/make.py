"""The way of the data as code: the chosen scheme → file → proof beside the stock preset.

Each stage is found or made under its content address; this module only puts them in order (choose.py: those before).
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynrun.artifacts import Outcome, link_or_copy
from dynrun.calibration.mixture import SELF_NAME, parse_mixture
from dynrun.calibration.stage import IMATRIX_FILE, ImatrixStage
from dynrun.choose import Chosen, Reporter, Settings, Texts, choose_scheme, imatrix_stage, job_for, read_texts
from dynrun.evaluation.kld import Row, evaluate, is_measured
from dynrun.llamacpp.build import installation
from dynrun.metrics.intervals import Ratio
from dynrun.models import Reference, made_path, open_reference
from dynrun.quantize import Preset, Quantized, make_from_scheme, make_stock, nearest_ftype
from dynrun.scheme import Scheme, write_scheme
from dynrun.sensitivity.stage import sensitivity_folder
from dynrun.target import XL_LABELS, Target, budget_for, check_budget


@dataclass(frozen=True)
class Made:
    """All that `make` ends with. ``stages`` in order, each with its time and whether it was there already."""

    file: Path
    scheme_path: Path
    scheme: Scheme
    reference: Reference
    imatrix: ImatrixStage
    chosen: Chosen
    row: Row
    baseline: Preset
    baseline_row: Row
    ratio: Ratio | None
    stages: tuple[Outcome, ...]
    elapsed_s: float


def make(
    model: str,
    target: Target,
    settings: Settings,
    reporter: Reporter,
    log: Callable[[str], None],
    out: Path | None = None,
) -> Made:
    """Make the best file of the wanted size, and prove it."""
    started = time.monotonic()
    reference = open_reference(model)
    texts = read_texts(reference, settings, reporter)
    imatrix = imatrix_stage(reference, texts, settings, reporter)
    chosen = choose_scheme(reference, imatrix, texts, target, settings, reporter, log)
    scheme, preset = chosen.scheme, chosen.preset
    ours, stock = _both_files(reference, scheme, preset, imatrix, settings, reporter)
    rows, evaluated = _evaluate(reference, [ours.path, stock.path], texts, settings, reporter)
    file = out or made_path(reference.name, chosen.budget.label)
    link_or_copy(ours.path, file)
    scheme_path = file.with_suffix(".scheme.toml")
    write_scheme(scheme, scheme_path)
    return Made(
        file=file,
        scheme_path=scheme_path,
        scheme=scheme,
        reference=reference,
        imatrix=imatrix,
        chosen=chosen,
        row=rows[0],
        baseline=preset,
        baseline_row=rows[1],
        ratio=rows[0].ratio_to(rows[1]),
        stages=(
            *(imatrix.outcome, chosen.table.outcome, chosen.search.outcome),
            *(ours.outcome, stock.outcome, evaluated),
        ),
        elapsed_s=time.monotonic() - started,
    )


def _both_files(
    reference: Reference,
    scheme: Scheme,
    preset: Preset,
    imatrix: ImatrixStage,
    settings: Settings,
    reporter: Reporter,
) -> tuple[Quantized, Quantized]:
    """The scheme's file and the stock preset's."""
    reporter.stage("quantize", f"{scheme.size_bytes:,} bytes")
    ours = make_from_scheme(
        reference, scheme, imatrix, n_threads=settings.config.n_threads, on_tensor=reporter.progress
    )
    reporter.stage("stock preset", f"{preset.ftype}, {preset.size_bytes:,} bytes")
    stock = make_stock(reference, preset, imatrix, n_threads=settings.config.n_threads, on_tensor=reporter.progress)
    return ours, stock


def _evaluate(
    reference: Reference, files: Sequence[Path], texts: Texts, settings: Settings, reporter: Reporter
) -> tuple[list[Row], Outcome]:
    started = time.monotonic()
    reporter.stage("evaluation", f"{settings.eval_tokens:,} tokens of the test split")
    known = all(is_measured(reference.path, file, texts.test) for file in files)
    rows = evaluate(
        reference.path,
        files,
        texts.test,
        n_threads=settings.config.n_threads,
        n_gpu_layers=settings.config.n_gpu_layers,
        progress=reporter.progress,
    )
    return rows, Outcome("evaluation", {}, time.monotonic() - started, cached=known)


@dataclass(frozen=True)
class PlannedStage:
    """A stage as `make --dry-run` shows it."""

    name: str
    cached: bool
    detail: str
    command: str = ""


def plan(model: str, target: Target, settings: Settings) -> list[PlannedStage]:
    """What :func:`make` would do: stages, sizes and commands. Sizes of a label need the imatrix to be there."""
    reference = open_reference(model)
    size, label = "known once the imatrix is there", target.quant or ""
    ftype = XL_LABELS.get(label, (label, 1.0))[0]
    known, probed = _known_imatrix(reference, settings), False
    if known is not None:
        imatrix, texts = known
        budget, preset = budget_for(reference, imatrix, target)
        check_budget(reference, imatrix, budget, settings.menu, settings.constraints)
        size, label, ftype = f"{budget.size_bytes:,} bytes", budget.label, preset.ftype
        probed = sensitivity_folder(reference, imatrix, texts.probe, settings.probes, settings.menu).complete
    program = str(installation().program("llama-quantize"))
    source = str(reference.path)
    ours = [program, "--imatrix", IMATRIX_FILE, "--tensor-type-file", "tensor-types.txt", source, "model.gguf"]
    stock = [program, "--imatrix", IMATRIX_FILE, source, "model.gguf", ftype or "PRESET"]
    probes = settings.probes
    return [
        PlannedStage("reference", True, f"{source}, {reference.header.file_bytes:,} bytes"),
        PlannedStage(
            "imatrix", known is not None, f"{settings.imatrix.n_tokens:,} tokens, n_ctx {settings.imatrix.n_ctx}"
        ),
        PlannedStage("sensitivity", probed, f"up to {probes.n_tokens:,} tokens a tensor"),
        PlannedStage("search", False, f"{size}, {settings.search.n_candidates} candidates"),
        PlannedStage(
            "quantize", False, size, shlex.join([*ours, nearest_ftype(label), str(settings.config.n_threads)])
        ),
        PlannedStage("stock preset", False, ftype, shlex.join([*stock, str(settings.config.n_threads)])),
        PlannedStage("evaluation", False, f"{settings.eval_tokens:,} tokens of the test split, reference and 2 files"),
        PlannedStage("result", False, str(made_path(reference.name, label or "?"))),
    ]


def _known_imatrix(reference: Reference, settings: Settings) -> tuple[ImatrixStage, Texts] | None:
    """The imatrix if it has been collected; nothing is generated or collected to find out."""
    if SELF_NAME in (one.spec for one in parse_mixture(settings.calibration)):
        return None
    texts = read_texts(reference, settings, _Silent())
    if not settings.imatrix_files and not job_for(reference, texts, settings, _Silent()).folder("imatrix").complete:
        return None
    return imatrix_stage(reference, texts, settings, _Silent()), texts


class _Silent:
    def stage(self, name: str, detail: str) -> None:
        pass

    def progress(self, done: float, total: float, note: str = "") -> None:
        pass
