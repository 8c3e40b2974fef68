"""A report out of what `make` ends with: one file beside the stock presets that were measured on the same text.

Takes the stages' results, gives a :class:`Report`; measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dynrun.artifacts import sha256_file
from dynrun.calibration.stage import ImatrixStage
from dynrun.evaluation.compare import Named, compare
from dynrun.evaluation.kld import Row
from dynrun.models import Reference
from dynrun.report.compared import TEXT, compared_report
from dynrun.report.data import FileResult, Report
from dynrun.report.text import kld
from dynrun.scheme import Scheme, sha256


@dataclass(frozen=True)
class MadeFile:
    """A file that `make` made of ``reference``: its ``scheme``, its ``row``, and under which names it was published."""

    reference: Reference
    imatrix: ImatrixStage
    scheme: Scheme
    row: Row
    files: Sequence[Path]
    scheme_path: Path


def made_report(made: MadeFile, stock: Mapping[str, Row], commands: Sequence[str] = ()) -> Report:
    """``stock``: ftype and row of every preset that was measured, that of the same size among them."""
    own = Named(f"dynrun {made.scheme.label}", made.row, "same")
    presets = [Named(ftype, row, "same") for ftype, row in stock.items()]
    compared = compare(made.reference.path, [TEXT], [own], presets)
    report = compared_report(compared, made.reference.name, commands=commands)
    file = renamed(report.files[0], made.files)
    return replace(
        report,
        files=(file, *report.files[1:]),
        provenance=(*report.provenance, *_provenance(made)),
        slopes=made.scheme.slopes,
        notes=(*report.notes, *warnings(made.reference)),
    )


def renamed(result: FileResult, files: Sequence[Path]) -> FileResult:
    """``result`` under the names that the file was published as."""
    if len(files) == 1:
        return replace(result, file=files[0].name)
    # The hash is of the whole file; what is published are its shards.
    return replace(result, file=f"{files[0].name} and {len(files) - 1} more", sha256="")


def warnings(reference: Reference) -> tuple[str, ...]:
    """What a reader must know of numbers measured against ``reference``."""
    return (f"Mind: {reference.warning}.",) if reference.warning else ()


def _provenance(made: MadeFile) -> tuple[tuple[str, str], ...]:
    imatrix, scheme = made.imatrix, made.scheme
    shards = made.files if len(made.files) > 1 else ()
    feedback = scheme.feedback or "none: plain rounding"
    if scheme.feedback and scheme.feedback_except:
        feedback += f"; plain in {scheme.feedback_except}"
    return (
        *((f"{path.name}, SHA-256", sha256_file(path)) for path in shards),
        ("Scheme", f"{made.scheme_path.name}, types of {len(scheme.types)} tensors"),
        ("Scheme, SHA-256", sha256(scheme)),
        *_known("Predicted KLD (sum of slope × error)", scheme.predicted_kld),
        *_known("KLD measured when it was chosen, on other text", scheme.measured_kld),
        ("Calibration", f"{imatrix.dataset}, {imatrix.n_tokens:,} tokens in {imatrix.n_sequences:,} sequences"),
        ("Chat template", imatrix.template),
        ("Imatrix, SHA-256", imatrix.sha256),
        ("Error feedback", feedback),
    )


def _known(heading: str, value: float | None) -> list[tuple[str, str]]:
    return [] if value is None else [(heading, kld(value))]
