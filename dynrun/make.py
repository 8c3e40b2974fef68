"""The way of the data as code: reference → imatrix → sensitivity → scheme → file → proof beside the stock preset.

Each stage is found or made under its content address; this module only puts them in order.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dynrun.allocation.stage import Budget, allocate
from dynrun.artifacts import Outcome, atomic_path, translated_os_errors
from dynrun.calibration.imatrix import read_imatrix
from dynrun.calibration.stage import (
    IMATRIX_FILE,
    ImatrixSettings,
    ImatrixStage,
    dataset_named,
    imatrix_folder,
    make_imatrix,
)
from dynrun.config import Config
from dynrun.errors import UsageError
from dynrun.evaluation.kld import Row, evaluate, is_measured
from dynrun.evaluation.texts import conversation_parts
from dynrun.gguf.quantizable import candidate_types, quantizable
from dynrun.gguf.tensor_types import DEFAULT_MENU
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.engine import Engine
from dynrun.metrics.intervals import Ratio
from dynrun.models import Reference, made_path, open_reference
from dynrun.quantize import (
    STOCK_PRESETS,
    Preset,
    Quantized,
    fixed_bytes,
    make_from_scheme,
    make_stock,
    nearest_ftype,
    stock_preset,
)
from dynrun.scheme import Scheme, write_scheme
from dynrun.sensitivity.stage import (
    ProbeSettings,
    SensitivityStage,
    TensorSensitivity,
    measure_sensitivity,
    sensitivity_folder,
)
from dynrun.sensitivity.sweep import Progress as ProbeDone

# Over the stock preset of the same bits, as Unsloth's files of these names are.
XL_LABELS = {"Q2_K_XL": ("Q2_K", 1.017), "Q3_K_XL": ("Q3_K_M", 1.020), "Q4_K_XL": ("Q4_K_M", 1.015)}


@dataclass(frozen=True)
class Target:
    """The wanted size, one of: a label, bits per weight over all tensors, bytes of the whole file."""

    quant: str | None = None
    bpw: float | None = None
    size_bytes: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.quant, self.bpw, self.size_bytes) if value is not None]
        if len(given) != 1:
            raise UsageError("say how large the file may be", fix="exactly one of --quant, --bpw and --size")
        if self.bpw is not None and self.bpw <= 0:
            raise UsageError(f"{self.bpw} bits per weight make no file", fix="give a positive --bpw")


@dataclass(frozen=True)
class Settings:
    """How `make` measures; the defaults are what the README's numbers were made with."""

    calibration: str = "builtin"
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


def budget_for(reference: Reference, imatrix: ImatrixStage, target: Target) -> tuple[Budget, Preset]:
    """The budget, and the stock preset to compare with: the label's own, or the largest that is no larger."""
    if target.quant is not None:
        ftype, factor = XL_LABELS.get(target.quant, (target.quant, 1.0))
        if ftype not in STOCK_PRESETS:
            raise UsageError(f"no quant {target.quant!r}", fix=f"one of {', '.join((*STOCK_PRESETS, *XL_LABELS))}")
        preset = stock_preset(reference, ftype, imatrix)
        label, size = target.quant, int(preset.size_bytes * factor)
    else:
        size = target.size_bytes or int((target.bpw or 0) * reference.header.n_elements / 8)
        label = f"{size * 8 / reference.header.n_elements:.2f}bpw"
        preset = nearest_preset(reference, imatrix, size)
    return Budget(label, size, fixed_bytes(reference, imatrix, label)), preset


def nearest_preset(reference: Reference, imatrix: ImatrixStage, size_bytes: int) -> Preset:
    """The largest stock preset of at most ``size_bytes``; the smallest of all where none is."""
    presets = [stock_preset(reference, name, imatrix) for name in STOCK_PRESETS if name not in _SPECIAL]
    fitting = [preset for preset in presets if preset.size_bytes <= size_bytes]
    return max(fitting, key=lambda p: p.size_bytes) if fitting else min(presets, key=lambda p: p.size_bytes)


# Presets for models that were trained for them.
_SPECIAL = frozenset({"TQ1_0", "TQ2_0", "MXFP4_MOE", "NVFP4", "Q1_0", "Q2_0"})


def imatrix_stage(reference: Reference, settings: Settings, reporter: Reporter) -> ImatrixStage:
    """The imatrix for ``reference``."""
    reporter.stage("imatrix", f"{settings.imatrix.n_tokens:,} tokens of {settings.calibration}")
    dataset = dataset_named(settings.calibration)
    return make_imatrix(reference, dataset, settings.imatrix, config=settings.config, progress=reporter.progress)


def sensitivity_stage(
    reference: Reference, imatrix: ImatrixStage, settings: Settings, reporter: Reporter, log: Callable[[str], None]
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
        dataset_named(settings.calibration),
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
    imatrix = imatrix_stage(reference, settings, reporter)
    budget, preset = budget_for(reference, imatrix, target)
    check_budget(reference, imatrix, budget, settings)
    table = sensitivity_stage(reference, imatrix, settings, reporter, log)
    begun = time.monotonic()
    reporter.stage("allocation", f"{budget.size_bytes:,} bytes")
    scheme = allocate(reference, imatrix, table.tensors, budget)
    allocated = Outcome("allocation", {}, time.monotonic() - begun, cached=False)
    ours, stock = _both_files(reference, scheme, preset, imatrix, settings, reporter)
    rows, evaluated = _evaluate(reference, [ours.path, stock.path], settings, reporter)
    file = publish(ours, out or made_path(reference.name, budget.label))
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


def check_budget(reference: Reference, imatrix: ImatrixStage, budget: Budget, settings: Settings) -> None:
    """Raise DoesNotFitError now rather than after the probes, where no scheme can meet the budget."""
    entries = read_imatrix(imatrix.path).sums
    metadata = reference.header.metadata
    free = {
        name: TensorSensitivity(None, dict.fromkeys(candidate_types(tensor, settings.menu, entries, metadata), 0.0))
        for name, tensor in quantizable(reference.header).items()
    }
    allocate(reference, imatrix, free, budget)


def _evaluate(
    reference: Reference, files: Sequence[Path], settings: Settings, reporter: Reporter
) -> tuple[list[Row], Outcome]:
    started = time.monotonic()
    reporter.stage("evaluation", f"{settings.eval_tokens:,} tokens of the test split")
    dataset = dataset_named(settings.calibration)
    with Engine.open(reference.path, n_ctx=16, n_threads=1, n_gpu_layers=0) as engine:
        parts = conversation_parts(engine, dataset=dataset, max_tokens=settings.eval_tokens, n_ctx=settings.eval_n_ctx)
    known = all(is_measured(reference.path, file, parts) for file in files)
    rows = evaluate(
        reference.path,
        files,
        parts,
        n_threads=settings.config.n_threads,
        n_gpu_layers=settings.config.n_gpu_layers,
        progress=reporter.progress,
    )
    return rows, Outcome("evaluation", {}, time.monotonic() - started, cached=known)


def publish(made: Quantized, target: Path) -> Path:
    """The made file under the name that people see; a hard link where the disk allows it."""
    with translated_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.link")
        try:
            temporary.hardlink_to(made.path)
            temporary.replace(target)
            # Renaming onto another link of the same file does nothing.
            temporary.unlink(missing_ok=True)
        except OSError:
            temporary.unlink(missing_ok=True)
            with atomic_path(target) as copy, made.path.open("rb") as source, copy.open("wb") as sink:
                while block := source.read(1 << 22):
                    sink.write(block)
    return target


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
    dataset = dataset_named(settings.calibration)
    folder = imatrix_folder(reference, dataset, settings.imatrix)
    known = (
        make_imatrix(reference, dataset, settings.imatrix, config=settings.config, progress=lambda *_: None)
        if folder.complete
        else None
    )
    size = "known once the imatrix is there"
    label = target.quant or ""
    ftype = XL_LABELS.get(label, (label, 1.0))[0]
    probed = False
    if known is not None:
        budget, preset = budget_for(reference, known, target)
        check_budget(reference, known, budget, settings)
        size, label, ftype = f"{budget.size_bytes:,} bytes", budget.label, preset.ftype
        probed = sensitivity_folder(reference, known, dataset, settings.probes, settings.menu).complete
    program = str(installation().program("llama-quantize"))
    source = str(reference.path)
    ours = [program, "--imatrix", IMATRIX_FILE, "--tensor-type-file", "tensor-types.txt", source, "model.gguf"]
    stock = [program, "--imatrix", IMATRIX_FILE, source, "model.gguf", ftype or "PRESET"]
    probes = settings.probes
    return [
        PlannedStage("reference", True, f"{source}, {reference.header.file_bytes:,} bytes"),
        PlannedStage(
            "imatrix", folder.complete, f"{settings.imatrix.n_tokens:,} tokens, n_ctx {settings.imatrix.n_ctx}"
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
