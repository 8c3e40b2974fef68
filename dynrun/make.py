"""The way of the data as code: the chosen scheme → file → proof beside the stock preset.

Each stage is found or made under its content address; this module only puts them in order (choose.py: those before).
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from dynrun.allocation.search_stage import search_folder
from dynrun.allocation.transfer import errors_folder
from dynrun.artifacts import Outcome, link_or_copy
from dynrun.calibration.mixture import SELF_NAME, parse_mixture
from dynrun.calibration.stage import IMATRIX_FILE, ImatrixStage
from dynrun.choose import Chosen, adopted, application, choose_scheme, required
from dynrun.evaluation.kld import Row, evaluate, is_measured
from dynrun.llamacpp.build import installation
from dynrun.metrics.intervals import Ratio
from dynrun.models import Reference, made_path, open_reference
from dynrun.quantize import Preset, Quantized, known_stock, make_from_scheme, make_stock, nearest_ftype, split
from dynrun.report.folder import Written, write_report
from dynrun.report.made import MadeFile, made_report
from dynrun.rounding.store import Feedback, feedback_folder
from dynrun.scheme import Scheme, write_scheme
from dynrun.sensitivity.stage import sensitivity_folder
from dynrun.stages import (
    Reporter,
    Settings,
    Statistics,
    Texts,
    covariance_stage,
    feedback_of,
    imatrix_stage,
    job_for,
    read_texts,
    sensitivity_stage,
    statistics,
)
from dynrun.target import XL_LABELS, Target, budget_for, check_budget


@dataclass(frozen=True)
class Made:
    """All that `make` ends with. ``files``: one, or its shards; ``report``: in a folder beside them; ``stages`` in
    order, each with its time and whether it was there already."""

    files: tuple[Path, ...]
    scheme_path: Path
    reference: Reference
    imatrix: ImatrixStage
    chosen: Chosen
    row: Row
    baseline_row: Row
    report: Written
    stages: tuple[Outcome, ...]
    elapsed_s: float

    @property
    def file(self) -> Path:
        """The file, or the first shard, which stands for all."""
        return self.files[0]

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def scheme(self) -> Scheme:
        return self.chosen.scheme

    @property
    def baseline(self) -> Preset:
        """The stock preset that is compared with."""
        return self.chosen.preset

    @property
    def ratio(self) -> Ratio | None:
        """The file's mean KLD over the stock preset's."""
        return self.row.ratio_to(self.baseline_row)


def make(
    model: str,
    target: Target | None,
    settings: Settings,
    reporter: Reporter,
    log: Callable[[str], None],
    out: Path | None = None,
    *,
    scheme: Scheme | None = None,
    split_max_size: int | None = None,
    commands: Sequence[str] = (),
) -> Made:
    """Make the best file of the wanted size, and prove it; or of a known ``scheme`` (:func:`choose_scheme`).

    With ``split_max_size`` the proof is of the single file; shards of so many bytes are written, the budget's in all.
    ``commands`` of the report: to make it again.
    """
    started = time.monotonic()
    with ready(model, settings, reporter, scheme) as shared:
        made = make_file(shared, target, settings, reporter, log, out, split_max_size=split_max_size, commands=commands)
    return replace(made, elapsed_s=time.monotonic() - started)


@dataclass(frozen=True)
class Ready:
    """What all files of one model share: measured, or found, once. ``scheme``: a known one, whole."""

    reference: Reference
    texts: Texts
    collected: Statistics
    feedback: Feedback | None
    scheme: Scheme | None = None


@contextmanager
def ready(model: str, settings: Settings, reporter: Reporter, scheme: Scheme | None = None) -> Iterator[Ready]:
    """The reference, the texts and what is collected of its activations."""
    reference = open_reference(model)
    known = adopted(scheme, reference) if scheme else None
    texts = read_texts(reference, settings, reporter)
    collected = statistics(reference, texts, settings, reporter)
    with feedback_of(reference, collected, settings) as feedback:
        yield Ready(reference, texts, collected, feedback, known)


def make_file(
    shared: Ready,
    target: Target | None,
    settings: Settings,
    reporter: Reporter,
    log: Callable[[str], None],
    out: Path | None = None,
    *,
    split_max_size: int | None = None,
    commands: Sequence[str] = (),
) -> Made:
    """One file of a model that is :func:`ready`; the rest as :func:`make` has it."""
    started, reference, collected, texts = time.monotonic(), shared.reference, shared.collected, shared.texts
    inputs = (reference, collected.imatrix, texts, target, settings, reporter, log)
    chosen = choose_scheme(*inputs, scheme=shared.scheme, split_max_size=split_max_size, feedback=shared.feedback)
    ours, stock = _both_files(reference, chosen, collected.imatrix, settings, reporter, split_max_size, shared.feedback)
    (row, baseline_row), evaluated = _evaluate(reference, [ours.path, stock.path], texts, settings, reporter)
    file = out or made_path(reference.name, chosen.budget.label)
    if file.is_dir():
        file /= f"{reference.name}-{chosen.budget.label}.gguf"
    files = _publish(ours.path, file, split_max_size, reporter)
    scheme_path = file.with_suffix(".scheme.toml")
    write_scheme(chosen.scheme, scheme_path)
    made = MadeFile(reference, collected.imatrix, chosen.scheme, row, files, scheme_path)
    report = _report(made, chosen.preset.ftype, baseline_row, texts, reporter, commands)
    return Made(
        *(files, scheme_path, reference, collected.imatrix, chosen, row, baseline_row, report),
        stages=(*collected.outcomes, *chosen.outcomes, ours.outcome, stock.outcome, evaluated),
        elapsed_s=time.monotonic() - started,
    )


def _report(
    made: MadeFile, ftype: str, baseline_row: Row, texts: Texts, reporter: Reporter, commands: Sequence[str]
) -> Written:
    """Beside the file; with the stock presets that earlier runs made and measured on this text as points of a curve."""
    reporter.stage("report", "tables, plots, model card")
    reference = made.reference.path
    known = known_stock(made.reference, made.imatrix).items()
    found = {ftype: path for ftype, path in known if is_measured(reference, path, texts.test)}
    rows = evaluate(reference, list(found.values()), texts.test, n_threads=1)
    presets = {**dict(zip(found, rows, strict=True)), ftype: baseline_row}
    # Beside the scheme, whose name is the file's: of shards too.
    folder = made.scheme_path.with_name(made.scheme_path.name.removesuffix(".scheme.toml") + ".report")
    return write_report(made_report(made, presets, commands), folder)


def _publish(made: Path, file: Path, split_max_size: int | None, reporter: Reporter) -> tuple[Path, ...]:
    """The file under the name that the user wants, or its shards."""
    if split_max_size is None:
        link_or_copy(made, file)
        return (file,)
    reporter.stage("split", f"shards of at most {split_max_size:,} bytes")
    return tuple(split(made, file.with_name(file.name.removesuffix(".gguf")), split_max_size))


def _both_files(
    reference: Reference,
    chosen: Chosen,
    imatrix: ImatrixStage,
    settings: Settings,
    reporter: Reporter,
    split_max_size: int | None,
    feedback: Feedback | None,
) -> tuple[Quantized, Quantized]:
    """The scheme's file and the stock preset's."""
    scheme, preset, n_threads = chosen.scheme, chosen.preset, settings.config.n_threads
    reporter.stage("quantize", f"{scheme.size_bytes:,} bytes")
    ours = make_from_scheme(
        *(reference, scheme, imatrix),
        n_threads=n_threads,
        on_tensor=reporter.progress,
        split_max_size=split_max_size,
        feedback=feedback,
    )
    reporter.stage("stock preset", f"{preset.ftype}, {preset.size_bytes:,} bytes")
    stock = make_stock(reference, preset, imatrix, n_threads=n_threads, on_tensor=reporter.progress)
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


# -- a dry run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedStage:
    """A stage as `make --dry-run` shows it."""

    name: str
    cached: bool
    detail: str
    command: str = ""


@dataclass(frozen=True)
class _Choice:
    """The stages that choose the types; ``size`` in words, ``label`` and ``ftype`` "" where they are not known yet."""

    stages: tuple[PlannedStage, ...]
    size: str
    label: str
    ftype: str


def plan(
    model: str,
    target: Target | None,
    settings: Settings,
    *,
    scheme: Scheme | None = None,
    split_max_size: int | None = None,
) -> list[PlannedStage]:
    """What :func:`make` would do: stages, sizes and commands. Sizes of a label need the imatrix to be there."""
    reference = open_reference(model)
    whole = adopted(scheme, reference) if scheme else None
    known = _known_imatrix(reference, settings)
    if known is None:
        choice = _unknown_choice(target, settings, whole)
    elif whole is None:
        choice = _searched_choice(reference, *known, target, settings, split_max_size)
    else:
        choice = _applied_choice(reference, known[0], target, settings, whole, split_max_size)
    read = f"{settings.imatrix.n_tokens:,} tokens, n_ctx {settings.imatrix.n_ctx}"
    covered = known is not None and _known_feedback(reference, *known, settings) is not None
    rounding = "the scheme with feedback, without, and with doubtful kinds of tensors plain"
    shards = f"shards of at most {split_max_size:,} bytes" if split_max_size else ""
    return [
        PlannedStage("reference", True, f"{reference.path}, {reference.header.file_bytes:,} bytes"),
        *([PlannedStage("covariance", covered, read)] if settings.feedback else []),
        PlannedStage("imatrix", known is not None, read),
        *choice.stages,
        *([PlannedStage("feedback", False, rounding)] if settings.feedback else []),
        *_file_stages(reference, choice, settings.config.n_threads),
        PlannedStage("evaluation", False, f"{settings.eval_tokens:,} tokens of the test split, reference and 2 files"),
        *([PlannedStage("split", False, shards)] if shards else []),
        PlannedStage("result", False, str(made_path(reference.name, choice.label or "?"))),
    ]


def _unknown_choice(target: Target | None, settings: Settings, scheme: Scheme | None) -> _Choice:
    """As far as it can be told before there is an imatrix."""
    label = target.quant or "" if target else scheme.label if scheme else ""
    size = "known once the imatrix is there"
    stages = _transfer_stages(size) if scheme and scheme.slopes else () if scheme else _search_stages(settings, size)
    return _Choice(stages, size, label, XL_LABELS.get(label, (label, 1.0))[0])


def _searched_choice(
    reference: Reference,
    imatrix: ImatrixStage,
    texts: Texts,
    target: Target | None,
    settings: Settings,
    split_max_size: int | None,
) -> _Choice:
    budget, preset = budget_for(reference, imatrix, required(target), split_max_size)
    check_budget(reference, imatrix, budget, settings.menu, settings.constraints)
    size, searched = f"{budget.size_bytes:,} bytes", False
    probed = sensitivity_folder(reference, imatrix, texts.probe, settings.probes, settings.menu).complete
    rounding = _known_feedback(reference, imatrix, texts, settings)
    if probed and rounding is not None:
        table = sensitivity_stage(reference, imatrix, texts, settings, _Silent(), lambda _: None)
        chosen = (budget, settings.constraints, settings.search)
        searched = search_folder(reference, imatrix, table, texts.selection, *chosen, rounding).complete
    return _Choice(_search_stages(settings, size, probed, searched), size, budget.label, preset.ftype)


def _known_feedback(reference: Reference, imatrix: ImatrixStage, texts: Texts, settings: Settings) -> str | None:
    """The key of the rounding, "" where none is wanted; None where the covariance is not there yet."""
    if settings.feedback is None:
        return ""
    if not job_for(reference, texts, settings, _Silent()).folder("covariance").complete:
        return None
    covariance = covariance_stage(reference, texts, settings, _Silent())
    return feedback_folder(reference, imatrix, covariance, settings.feedback).key if covariance else ""


def _applied_choice(
    reference: Reference,
    imatrix: ImatrixStage,
    target: Target | None,
    settings: Settings,
    scheme: Scheme,
    split_max_size: int | None,
) -> _Choice:
    found = application(reference, imatrix, scheme, target, settings, split_max_size)
    label, ftype = found.budget.label, found.preset.ftype
    if found.stands:
        return _Choice((), f"{found.scheme.size_bytes:,} bytes", label, ftype)
    size = f"{found.budget.size_bytes:,} bytes"
    computed = errors_folder(reference, imatrix, settings.menu, settings.probes).complete
    return _Choice(_transfer_stages(size, computed), size, label, ftype)


def _search_stages(
    settings: Settings, size: str, probed: bool = False, searched: bool = False
) -> tuple[PlannedStage, ...]:
    return (
        PlannedStage("sensitivity", probed, f"up to {settings.probes.n_tokens:,} tokens a tensor"),
        PlannedStage("search", searched, f"{size}, {settings.search.n_candidates} candidates"),
    )


def _transfer_stages(size: str, computed: bool = False) -> tuple[PlannedStage, ...]:
    return (
        PlannedStage("errors", computed, "of all types; the slopes are the scheme's"),
        PlannedStage("allocation", False, size),
    )


def _file_stages(reference: Reference, choice: _Choice, n_threads: int) -> tuple[PlannedStage, ...]:
    program, source = str(installation().program("llama-quantize")), str(reference.path)
    types = ["--tensor-type-file", "tensor-types.txt"]
    ours = [program, "--imatrix", IMATRIX_FILE, *types, source, "model.gguf", nearest_ftype(choice.label)]
    stock = [program, "--imatrix", IMATRIX_FILE, source, "model.gguf", choice.ftype or "PRESET"]
    return (
        PlannedStage("quantize", False, choice.size, shlex.join([*ours, str(n_threads)])),
        PlannedStage("stock preset", False, choice.ftype, shlex.join([*stock, str(n_threads)])),
    )


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
