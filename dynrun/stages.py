"""The settings of `make`, and its stages up to the sensitivity table: texts, statistics, the rounding, the probes.

Each stage is found or made under its content address; this module only gives them what they need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dynrun.allocation.constraints import NO_CONSTRAINTS, Constraints
from dynrun.allocation.search import SearchSettings
from dynrun.artifacts import Outcome
from dynrun.calibration.experts import is_expert
from dynrun.calibration.sequences import TokenSequence
from dynrun.calibration.stage import (
    CovarianceStage,
    ImatrixSettings,
    ImatrixStage,
    Job,
    import_imatrix,
    make_covariance,
    make_imatrix,
)
from dynrun.calibration.text import Pool, open_text
from dynrun.config import Config
from dynrun.evaluation.texts import scored
from dynrun.gguf.tensor_types import DEFAULT_MENU
from dynrun.models import Reference
from dynrun.rounding.settings import FeedbackSettings
from dynrun.rounding.store import Feedback, open_feedback
from dynrun.scoring.reference import Scored
from dynrun.sensitivity.adaptive import Progress as ProbeDone
from dynrun.sensitivity.stage import ProbeSettings, SensitivityStage, measure_sensitivity


@dataclass(frozen=True)
class Settings:
    """How `make` measures; the defaults are what the README's numbers were made with.

    ``calibration`` is a mixture; ``chat_template`` a file in the place of the model's own; ``imatrix_files``
    somebody's, merged, in the place of an imatrix collected here; no ``feedback``: plain rounding.
    """

    calibration: str = "builtin"
    chat_template: Path | None = None
    imatrix_files: tuple[Path, ...] = ()
    imatrix: ImatrixSettings = field(default_factory=ImatrixSettings)
    probes: ProbeSettings = field(default_factory=ProbeSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    menu: tuple[str, ...] = DEFAULT_MENU
    constraints: Constraints = NO_CONSTRAINTS
    feedback: FeedbackSettings | None = field(default_factory=FeedbackSettings)
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


def covariance_stage(
    reference: Reference, texts: Texts, settings: Settings, reporter: Reporter
) -> CovarianceStage | None:
    """The covariance for ``reference``, and the imatrix from the same pass, where feedback is wanted."""
    if settings.feedback is None:
        return None
    reporter.stage("covariance", f"{settings.imatrix.n_tokens:,} tokens of {texts.name}, and the imatrix")
    return make_covariance(job_for(reference, texts, settings, reporter))


@dataclass(frozen=True)
class Statistics:
    """The imatrix, and the covariance where feedback is wanted."""

    imatrix: ImatrixStage
    covariance: CovarianceStage | None

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """The stages that it took."""
        return (*([self.covariance.outcome] if self.covariance else []), self.imatrix.outcome)


def statistics(reference: Reference, texts: Texts, settings: Settings, reporter: Reporter) -> Statistics:
    """All that is collected of ``reference``'s activations."""
    # The covariance first: the imatrix comes out of the same pass.
    covariance = covariance_stage(reference, texts, settings, reporter)
    return Statistics(imatrix_stage(reference, texts, settings, reporter), covariance)


@contextmanager
def feedback_of(reference: Reference, found: Statistics, settings: Settings) -> Iterator[Feedback | None]:
    """What rounds with feedback, where it is wanted."""
    if settings.feedback is None or found.covariance is None:
        yield None
        return
    inputs = (reference, found.imatrix, found.covariance, settings.feedback)
    memory, n_threads = settings.imatrix.memory, settings.config.n_threads
    with open_feedback(*inputs, n_threads=n_threads, memory=memory) as feedback:
        yield feedback


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
