"""The first half of the way of the data as code: reference → texts → imatrix → sensitivity → the chosen scheme; or a
known scheme on another model, with nothing measured.

Each stage is found or made under its content address; this module only puts them in order. Makes no file of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from dynrun import __version__
from dynrun.allocation.rounding_choice import RoundingStage, choose_rounding
from dynrun.allocation.search_stage import SearchStage, search
from dynrun.allocation.stage import Budget, allocate
from dynrun.allocation.transfer import follows, stands, transferred
from dynrun.artifacts import Outcome
from dynrun.calibration.stage import (
    ImatrixStage,
)
from dynrun.errors import UsageError
from dynrun.gguf.quantizable import quantizable
from dynrun.llamacpp.build import installation
from dynrun.models import Reference
from dynrun.quantize import Preset, check_scheme, scheme_bytes
from dynrun.rounding.store import Feedback
from dynrun.scheme import Scheme, check_architecture, expanded
from dynrun.sensitivity.feedback_errors import with_feedback
from dynrun.sensitivity.stage import SensitivityStage
from dynrun.stages import Reporter, Settings, Texts, sensitivity_stage
from dynrun.target import Target, budget_for, budget_of, check_budget


@dataclass(frozen=True)
class Chosen:
    """The scheme for one budget; ``preset``: the stock preset to compare with; no ``table`` where a known scheme was
    taken as it stands, no ``rounding`` without feedback."""

    scheme: Scheme
    budget: Budget
    preset: Preset
    table: SensitivityStage | None
    search: SearchStage
    rounding: RoundingStage | None = None

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """The stages that it took."""
        table, rounding = ([one.outcome] if one else [] for one in (self.table, self.rounding))
        return (*table, self.search.outcome, *rounding)


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
    feedback: Feedback | None = None,
) -> Chosen:
    """The best scheme within the target that is found by measuring; where a known ``scheme`` is given, what
    :func:`application` says, and no types are measured. ``split_max_size``: of the file's shards, if it is to have any.
    With ``feedback`` types are chosen for it, and whether it is kept is measured too.

    Raises what an impossible target raises before the first minute is spent. Without a ``scheme`` there must be a
    ``target``.
    """
    if scheme is not None:
        known = application(reference, imatrix, scheme, target, settings, split_max_size)
        applied = _apply(reference, imatrix, known, settings, reporter, feedback)
        return _with_rounding(reference, imatrix, texts, applied, settings, reporter, feedback)
    budget, preset = budget_for(reference, imatrix, required(target), split_max_size)
    check_budget(reference, imatrix, budget, settings.menu, settings.constraints)
    table = sensitivity_stage(reference, imatrix, texts, settings, reporter, log)
    table = after_feedback(table, feedback, reporter)
    found = _search(reference, imatrix, table, texts, budget, settings, reporter, log, feedback)
    slopes = {name: row.slope.points for name, row in table.tensors.items() if row.slope}
    chosen = Chosen(replace(found.scheme, slopes=slopes, probe_tokens=table.n_tokens), budget, preset, table, found)
    return _with_rounding(reference, imatrix, texts, chosen, settings, reporter, feedback)


def after_feedback(table: SensitivityStage, feedback: Feedback | None, reporter: Reporter) -> SensitivityStage:
    """The table with the types' errors as feedback makes them, where it is wanted."""
    if feedback is None:
        return table
    reporter.stage("feedback", "what it takes off the types' errors, on held-out activations")
    return with_feedback(table, feedback, lambda done, total: reporter.progress(done, total, "tensors"))


def _with_rounding(
    reference: Reference,
    imatrix: ImatrixStage,
    texts: Texts,
    chosen: Chosen,
    settings: Settings,
    reporter: Reporter,
    feedback: Feedback | None,
) -> Chosen:
    """``chosen`` with what its scheme says of feedback."""
    if feedback is None:
        plain = replace(chosen.scheme, feedback="", feedback_except="")
        return replace(chosen, scheme=plain)
    reporter.stage("feedback", "the scheme with it, without it, and with doubtful kinds of tensors plain")
    found = choose_rounding(
        *(reference, imatrix, chosen.scheme, texts.selection or texts.probe, feedback),
        config=settings.config,
        narrate=reporter.progress,
    )
    return replace(chosen, scheme=found.applied(chosen.scheme, feedback), rounding=found)


def _search(
    reference: Reference,
    imatrix: ImatrixStage,
    table: SensitivityStage,
    texts: Texts,
    budget: Budget,
    settings: Settings,
    reporter: Reporter,
    log: Callable[[str], None],
    feedback: Feedback | None,
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
        feedback=feedback,
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
    reference: Reference,
    imatrix: ImatrixStage,
    known: Application,
    settings: Settings,
    reporter: Reporter,
    feedback: Feedback | None,
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
    table = after_feedback(table, feedback, reporter)
    solved = allocate(reference, imatrix, table.tensors, known.budget, settings.constraints)
    solved = replace(solved, slopes=known.scheme.slopes, probe_tokens=known.scheme.probe_tokens)
    return Chosen(solved, known.budget, known.preset, table, _unsearched(solved))


def _unsearched(scheme: Scheme) -> SearchStage:
    return SearchStage(scheme, (), None, None, Outcome("search", {}, 0.0, cached=True))
