"""The way of the data as code: reference → imatrix → sensitivity → scheme → file → proof beside the stock preset.

Each stage is found or made under its content address; this module only puts them in order.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dynrun.allocation.stage import allocate
from dynrun.artifacts import Outcome, link_or_copy
from dynrun.calibration.experts import is_expert
from dynrun.calibration.mixture import SELF_NAME, parse_mixture
from dynrun.calibration.sequences import TokenSequence
from dynrun.calibration.stage import (
    IMATRIX_FILE,
    ImatrixSettings,
    ImatrixStage,
    Job,
    import_imatrix,
    make_imatrix,
)
from dynrun.calibration.text import Pool, open_text
from dynrun.config import Config
from dynrun.evaluation.kld import Row, evaluate, is_measured
from dynrun.evaluation.texts import scored
from dynrun.gguf.tensor_types import DEFAULT_MENU
from dynrun.llamacpp.build import installation
from dynrun.metrics.intervals import Ratio
from dynrun.models import Reference, made_path, open_reference
from dynrun.quantize import Preset, Quantized, make_from_scheme, make_stock, nearest_ftype
from dynrun.scheme import Scheme, write_scheme
from dynrun.scoring.reference import Scored
from dynrun.sensitivity.stage import ProbeSettings, SensitivityStage, measure_sensitivity, sensitivity_folder
from dynrun.sensitivity.sweep import Progress as ProbeDone
from dynrun.target import XL_LABELS, Target, budget_for, check_budget


@dataclass(frozen=True)
class Settings:
    """How `make` measures; the defaults are what the README's numbers were made with.

    ``calibration`` is a mixture; ``chat_template`` a file in the place of the model's own; ``imatrix_files``
    somebody's, merged, in the place of an imatrix collected here.
    """

    calibration: str = "builtin"
    chat_template: Path | None = None
    imatrix_files: tuple[Path, ...] = ()
    imatrix: ImatrixSettings = field(default_factory=ImatrixSettings)
    probes: ProbeSettings = field(default_factory=ProbeSettings)
    menu: tuple[str, ...] = DEFAULT_MENU
    eval_tokens: int = 16384
    eval_n_ctx: int = 512
    config: Config = field(default_factory=Config)


class Reporter(Protocol):
    """What a front end does with the progress of a stage: ``done`` of ``total`` units."""

    def stage(self, name: str, detail: str) -> None: ...
    def progress(self, done: float, total: float, note: str = "") -> None: ...


@dataclass(frozen=True)
class Made:
    """All that `make` ends with. ``stages`` in order, each with its time and whether it was there already."""

    file: Path
    scheme_path: Path
    scheme: Scheme
    reference: Reference
    imatrix: ImatrixStage
    row: Row
    baseline: Preset
    baseline_row: Row
    ratio: Ratio | None
    stages: tuple[Outcome, ...]
    elapsed_s: float


@dataclass(frozen=True)
class Texts:
    """All the text of one run, tokenized: to calibrate on, to probe on, to prove on. ``name`` is the mixture's."""

    name: str
    template: str
    pool: Pool
    probe: tuple[TokenSequence, ...]
    test: tuple[Scored, ...]


def read_texts(reference: Reference, settings: Settings, reporter: Reporter) -> Texts:
    """Open the sources; models with experts get more to draw from, as rare experts may need it."""
    wanted = settings.imatrix
    n_tokens = wanted.cap if any(is_expert(name) for name in reference.header.tensors) else wanted.n_tokens
    reporter.stage("text", settings.calibration)
    with open_text(
        reference,
        settings.calibration,
        n_tokens=wanted.n_tokens,
        config=settings.config,
        chat_template=settings.chat_template,
        progress=reporter.progress,
    ) as text:
        pool = text.calibration(n_tokens=n_tokens, n_ctx=wanted.n_ctx)
        for note in pool.notes:
            reporter.stage("text", note)
        probe = text.probe(n_tokens=settings.probes.n_coarse_tokens, n_ctx=settings.probes.n_ctx)
        test = scored(text.test(n_tokens=settings.eval_tokens, n_ctx=settings.eval_n_ctx))
        return Texts(text.name, text.template.origin, pool, tuple(probe), tuple(test))


def job_for(reference: Reference, texts: Texts, settings: Settings, reporter: Reporter) -> Job:
    """What the statistics are collected on."""
    sequences = texts.pool.sequences
    return Job(reference, sequences, settings.imatrix, texts.name, texts.template, settings.config, reporter.progress)


def imatrix_stage(reference: Reference, texts: Texts, settings: Settings, reporter: Reporter) -> ImatrixStage:
    """The imatrix for ``reference``."""
    if files := settings.imatrix_files:
        reporter.stage("imatrix", f"imported from {', '.join(map(str, files))}")
        return import_imatrix(reference, files, min_expert_tokens=settings.imatrix.min_expert_tokens)
    reporter.stage("imatrix", f"{settings.imatrix.n_tokens:,} tokens of {texts.name}")
    return make_imatrix(job_for(reference, texts, settings, reporter))


def sensitivity_stage(
    reference: Reference,
    imatrix: ImatrixStage,
    texts: Texts,
    settings: Settings,
    reporter: Reporter,
    log: Callable[[str], None],
) -> SensitivityStage:
    """The sensitivity table for ``reference``; a line for each probe goes to ``log``."""

    def on_probe(done: ProbeDone) -> None:
        probe = done.probe
        measured = f"{probe.tensor} {probe.type}: error {probe.error:.6f}, KLD {done.kld:.6f}"
        log(f"{measured}, {probe.elapsed_s:.1f} s")
        reporter.progress(done.done, done.total, measured)

    reporter.stage(
        "sensitivity", f"{settings.probes.n_coarse_tokens:,} + {settings.probes.n_fine_tokens:,} tokens a tensor"
    )
    return measure_sensitivity(
        reference,
        imatrix,
        texts.probe,
        settings.probes,
        settings.menu,
        config=settings.config,
        on_probe=on_probe,
        on_error=lambda done, total: reporter.progress(done, total, "errors of all types"),
    )


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
    budget, preset = budget_for(reference, imatrix, target)
    check_budget(reference, imatrix, budget, settings.menu)
    table = sensitivity_stage(reference, imatrix, texts, settings, reporter, log)
    begun = time.monotonic()
    reporter.stage("allocation", f"{budget.size_bytes:,} bytes")
    scheme = allocate(reference, imatrix, table.tensors, budget)
    allocated = Outcome("allocation", {}, time.monotonic() - begun, cached=False)
    ours, stock = _both_files(reference, scheme, preset, imatrix, settings, reporter)
    rows, evaluated = _evaluate(reference, [ours.path, stock.path], texts, settings, reporter)
    file = out or made_path(reference.name, budget.label)
    link_or_copy(ours.path, file)
    scheme_path = file.with_suffix(".scheme.toml")
    write_scheme(scheme, scheme_path)
    return Made(
        file=file,
        scheme_path=scheme_path,
        scheme=scheme,
        reference=reference,
        imatrix=imatrix,
        row=rows[0],
        baseline=preset,
        baseline_row=rows[1],
        ratio=rows[0].ratio_to(rows[1]),
        stages=(imatrix.outcome, table.outcome, allocated, ours.outcome, stock.outcome, evaluated),
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
        check_budget(reference, imatrix, budget, settings.menu)
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
        PlannedStage("sensitivity", probed, f"{probes.n_coarse_tokens:,} + {probes.n_fine_tokens:,} tokens a tensor"),
        PlannedStage("allocation", False, size),
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
