"""Several files of one model, with all that can be shared measured once.

Reference, texts, imatrix, covariance, sensitivities and the reference's log-probabilities are; each further file costs
its search, its rounding, its quantization and its evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dynrun.artifacts import link_or_copy
from dynrun.choose import required
from dynrun.errors import UsageError
from dynrun.evaluation.kld import Row
from dynrun.make import Made, Ready, make_file, ready
from dynrun.models import made_path
from dynrun.report.batch import batch_report
from dynrun.report.folder import Written, write_report
from dynrun.report.made import MadeFile
from dynrun.stages import Reporter, Settings
from dynrun.target import Target, budget_for, check_budget


@dataclass(frozen=True)
class Batch:
    """``made`` in the order asked for; ``imatrix``: its copy beside the files; ``report``: of all of them."""

    made: tuple[Made, ...]
    imatrix: Path
    report: Written
    elapsed_s: float


def make_batch(
    model: str,
    targets: Sequence[Target],
    settings: Settings,
    reporter: Reporter,
    log: Callable[[str], None],
    out: Path | None = None,
    *,
    split_max_size: int | None = None,
    commands: Sequence[str] = (),
) -> Batch:
    """A file for each of ``targets``, each proved, in the folder ``out`` with the imatrix, schemes and one report.

    Raises what is impossible about any of them before the first is begun, as soon as there is an imatrix.
    """
    started = time.monotonic()
    if out is not None and (out.is_file() or out.suffix == ".gguf"):
        raise UsageError(f"--out {out} is no folder", fix="several quants need a folder to be put in")
    with ready(model, settings, reporter) as shared:
        labels = _check(shared, targets, settings, split_max_size)
        made = []
        for i, (target, label) in enumerate(zip(targets, labels, strict=True)):
            reporter.stage("file", f"{i + 1} of {len(targets)}: {label}")
            file = out / f"{shared.reference.name}-{label}.gguf" if out else None
            inputs = (shared, target, settings, reporter, log, file)
            one = make_file(*inputs, split_max_size=split_max_size, commands=commands)
            # The first waits for all that is shared.
            made.append(_sharing(one, shared) if i else replace(one, elapsed_s=time.monotonic() - started))
    folder = out or made_path(shared.reference.name, "batch").with_suffix("")
    imatrix = folder / f"{shared.reference.name}-imatrix.gguf"
    link_or_copy(made[0].imatrix.path, imatrix)
    reporter.stage("report", f"of {len(made)} files")
    report = write_report(batch_report([_file(one) for one in made], _stock(made), commands), folder)
    return Batch(tuple(made), imatrix, report, time.monotonic() - started)


def _sharing(made: Made, shared: Ready) -> Made:
    """``made`` with what the file before it had to wait for as found."""
    common = shared.collected.outcomes
    return replace(made, stages=tuple(replace(s, cached=True) if s in common else s for s in made.stages))


def _check(shared: Ready, targets: Sequence[Target], settings: Settings, split_max_size: int | None) -> list[str]:
    """The labels of all. Raises UsageError for one that is asked for twice, and what an impossible target raises."""
    labels: list[str] = []
    for target in targets:
        budget, _ = budget_for(shared.reference, shared.collected.imatrix, required(target), split_max_size)
        check_budget(shared.reference, shared.collected.imatrix, budget, settings.menu, settings.constraints)
        if budget.label in labels:
            raise UsageError(f"{budget.label} is asked for twice", fix="name each quant once")
        labels.append(budget.label)
    return labels


def _file(made: Made) -> MadeFile:
    return MadeFile(made.reference, made.imatrix, made.scheme, made.row, made.files, made.scheme_path)


def _stock(made: Sequence[Made]) -> dict[str, Row]:
    return {one.baseline.ftype: one.baseline_row for one in made}
