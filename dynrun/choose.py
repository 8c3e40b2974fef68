"""The first half of the way of the data as code: reference → texts → imatrix → sensitivity → the chosen scheme; or a
known scheme on another model, with nothing measured.

Each stage is found or made under its content address; this module only puts them in order. Makes no file of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from dynrun import __version__
from dynrun.allocation.constraints import NO_CONSTRAINTS, Constraints
from dynrun.allocation.search import SearchSettings
from dynrun.allocation.search_stage import SearchStage, search
from dynrun.allocation.stage import Budget, allocate
from dynrun.allocation.transfer import follows, stands, transferred
from dynrun.artifacts import Outcome
from dynrun.calibration.experts import is_expert
from dynrun.calibration.sequences import TokenSequence
from dynrun.calibration.stage import ImatrixSettings, ImatrixStage, Job, import_imatrix, make_imatrix
from dynrun.calibration.text import Pool, open_text
from dynrun.config import Config
from dynrun.errors import UsageError
from dynrun.evaluation.texts import scored
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.tensor_types import DEFAULT_MENU
from dynrun.llamacpp.build import installation
from dynrun.models import Reference
from dynrun.quantize import Preset, check_scheme, scheme_bytes
from dynrun.scheme import Scheme, check_architecture, expanded
from dynrun.scoring.reference import Scored
from dynrun.sensitivity.adaptive import Progress as ProbeDone
from dynrun.sensitivity.stage import ProbeSettings, SensitivityStage, measure_sensitivity
from dynrun.target import Target, budget_for, budget_of, check_budget


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
    search: SearchSettings = field(default_factory=SearchSettings)
    menu: tuple[str, ...] = DEFAULT_MENU
    constraints: Constraints = NO_CONSTRAINTS
    eval_tokens: int = 16384
    eval_n_ctx: int = 512
    config: Config = field(default_factory=Config)


class Reporter(Protocol):
    """What a front end does with the progress of a stage: ``done`` of ``total`` units."""

    def stage(self, name: str, detail: str) -> None: ...
    def progress(self, done: float, total: float, note: str = "") -> None: ...


@dataclass(frozen=True)
class Texts:
    """All the text of one run, tokenized: to calibrate on, to probe on, to select candidates by, to prove on.
    ``name`` is the mixture's."""

    name: str
    template: str
    pool: Pool
    probe: tuple[TokenSequence, ...]
    selection: tuple[TokenSequence, ...]
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
        probe = text.probe(n_tokens=settings.probes.n_tokens, n_ctx=settings.probes.n_ctx)
        chosen = settings.search
        selection = text.probe(n_tokens=chosen.n_tokens, n_ctx=chosen.n_ctx) if chosen.n_candidates else []
        test = scored(text.test(n_tokens=settings.eval_tokens, n_ctx=settings.eval_n_ctx))
        return Texts(text.name, text.template.origin, pool, tuple(probe), tuple(selection), tuple(test))


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
        types = ", ".join(sorted(set(probe.types.values())))
        measured = f"{probe.name} {types}: error {probe.error:.6f}, KLD {probe.kld:.6f}"
        log(f"{measured}, {probe.elapsed_s:.1f} s")
        reporter.progress(done.done, done.total, measured)

    reporter.stage("sensitivity", f"up to {settings.probes.n_tokens:,} tokens a tensor")
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


@dataclass(frozen=True)
class Chosen:
    """The scheme for one budget; ``preset``: the stock preset to compare with; no ``table`` where a known scheme was
    taken as it stands."""

    scheme: Scheme
    budget: Budget
    preset: Preset
    table: SensitivityStage | None
    search: SearchStage

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """The stages that it took."""
        return (*([self.table.outcome] if self.table else []), self.search.outcome)


def choose_scheme(
    reference: Reference,
    imatrix: ImatrixStage,
    texts: Texts,
    target: Target | None,
    settings: Settings,
    reporter: Reporter,
    log: Callable[[str], None],
    *,
    scheme: Scheme | None = None,
    split_max_size: int | None = None,
) -> Chosen:
    """The best scheme within the target that is found by measuring; where a known ``scheme`` is given, what
    :func:`application` says, and nothing is measured. ``split_max_size``: of the file's shards, if it is to have any.

    Raises what an impossible target raises before the first minute is spent. Without a ``scheme`` there must be a
    ``target``.
    """
    if scheme is not None:
        known = application(reference, imatrix, scheme, target, settings, split_max_size)
        return _apply(reference, imatrix, known, settings, reporter)
    budget, preset = budget_for(reference, imatrix, required(target), split_max_size)
    check_budget(reference, imatrix, budget, settings.menu, settings.constraints)
    table = sensitivity_stage(reference, imatrix, texts, settings, reporter, log)
    found = _search(reference, imatrix, table, texts, budget, settings, reporter, log)
    slopes = {name: row.slope.points for name, row in table.tensors.items() if row.slope}
    return Chosen(replace(found.scheme, slopes=slopes, probe_tokens=table.n_tokens), budget, preset, table, found)


def _search(
    reference: Reference,
    imatrix: ImatrixStage,
    table: SensitivityStage,
    texts: Texts,
    budget: Budget,
    settings: Settings,
    reporter: Reporter,
    log: Callable[[str], None],
) -> SearchStage:
    reporter.stage("search", f"{budget.size_bytes:,} bytes, {settings.search.n_candidates} candidates")

    def narrate(done: float, total: float, note: str = "") -> None:
        log(note)
        reporter.progress(done, total, note)

    return search(
        *(reference, imatrix, table),
        texts.selection,
        budget,
        constraints=settings.constraints,
        settings=settings.search,
        config=settings.config,
        narrate=narrate,
    )


def required(target: Target | None) -> Target:
    """A target where there is no scheme to have one. Raises UsageError."""
    if target is None:
        raise UsageError("say how large the file may be", fix="one of --quant, --bpw and --size, or a --scheme")
    return target


# -- a known scheme ----------------------------------------------------------------------------------------------------


def adopted(scheme: Scheme, reference: Reference) -> Scheme:
    """``scheme`` with a type for each tensor of ``reference``. Raises UsageError, naming the first tensor, where it is
    for another model."""
    check_architecture(scheme, reference.header.architecture, reference.path)
    tensors = quantizable(reference.header)
    if unknown := [name for name in scheme.slopes if name not in tensors]:
        raise UsageError(
            f"the scheme has a slope of {unknown[0]}, which {reference.path.name} has not",
            fix="take a scheme of a model of the same shape",
        )
    whole = expanded(scheme, tensors)
    check_scheme(reference, whole)
    return whole


@dataclass(frozen=True)
class Application:
    """A known scheme on a model: its types stay where ``stands``, else they are chosen anew within ``budget`` by its
    slopes; ``preset``: the stock preset to compare with."""

    scheme: Scheme
    budget: Budget
    preset: Preset
    stands: bool


def application(
    reference: Reference,
    imatrix: ImatrixStage,
    scheme: Scheme,
    target: Target | None,
    settings: Settings,
    split_max_size: int | None = None,
) -> Application:
    """What becomes of an :func:`adopted` scheme on ``reference`` (allocation/transfer.py: ``stands``).

    Its own budget counts where there is no ``target``. Raises what an impossible wish raises.
    """
    size = scheme_bytes(reference, scheme, imatrix)
    wanted = budget_for(reference, imatrix, target, split_max_size) if target else None
    obeys = follows(reference, imatrix, scheme, settings.menu, settings.constraints)
    if not stands(scheme, reference, size, wanted[0].size_bytes if wanted else None, obeys=obeys):
        budget, preset = wanted or budget_of(
            reference, imatrix, scheme.label, scheme.budget_bytes or size, split_max_size
        )
        check_budget(reference, imatrix, budget, settings.menu, settings.constraints)
        return Application(scheme, budget, preset, stands=False)
    check_scheme(reference, scheme, imatrix)
    budget, preset = wanted or budget_of(reference, imatrix, scheme.label, size)
    return Application(_headed(scheme, reference, imatrix, size), replace(budget, label=scheme.label), preset, True)


def _headed(scheme: Scheme, reference: Reference, imatrix: ImatrixStage, size: int) -> Scheme:
    """``scheme`` with a head that says what its file is made of; the same one where it says so already."""
    known = (scheme.source_sha256, scheme.imatrix_sha256) == (reference.sha256, imatrix.sha256)
    return replace(
        scheme,
        architecture=reference.header.architecture,
        source=reference.name,
        source_sha256=reference.sha256,
        budget_bytes=max(scheme.budget_bytes, size),
        size_bytes=size,
        predicted_kld=scheme.predicted_kld if known else None,
        measured_kld=scheme.measured_kld if known else None,
        calibration=imatrix.dataset,
        imatrix_sha256=imatrix.sha256,
        llama_cpp_commit=installation().commit,
        dynrun=__version__,
    )


def _apply(
    reference: Reference, imatrix: ImatrixStage, known: Application, settings: Settings, reporter: Reporter
) -> Chosen:
    if known.stands:
        reporter.stage("scheme", f"{known.scheme.label}, its types as they stand")
        return Chosen(known.scheme, known.budget, known.preset, None, _unsearched(known.scheme))
    reporter.stage("errors", "of all types; the slopes are the scheme's")
    table = transferred(
        *(reference, imatrix, known.scheme.slopes, settings.menu, settings.probes),
        config=settings.config,
        on_error=lambda done, total: reporter.progress(done, total, "errors of all types"),
    )
    solved = allocate(reference, imatrix, table.tensors, known.budget, settings.constraints)
    solved = replace(solved, slopes=known.scheme.slopes, probe_tokens=known.scheme.probe_tokens)
    return Chosen(solved, known.budget, known.preset, table, _unsearched(solved))


def _unsearched(scheme: Scheme) -> SearchStage:
    return SearchStage(scheme, (), None, None, Outcome("search", {}, 0.0, cached=True))
