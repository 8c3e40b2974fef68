"""One report of several files of one model: what a repository shows on its first page.

Takes what `make` ended with for each, gives a :class:`Report`; measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dynrun.evaluation.compare import Named, compare
from dynrun.evaluation.kld import Row
from dynrun.report.compared import TEXT, compared_report
from dynrun.report.data import Report
from dynrun.report.made import MadeFile, renamed, warnings
from dynrun.scheme import sha256


def batch_report(
    made: Sequence[MadeFile], stock: Mapping[str, Row], commands: Sequence[str] = (), repository: str = ""
) -> Report:
    """``stock``: ftype and row of every preset that was measured on the same text."""
    first = made[0]
    own = [Named(f"dynrun {one.scheme.label}", one.row, "same") for one in made]
    compared = compare(first.reference.path, [TEXT], own, [Named(ftype, row, "same") for ftype, row in stock.items()])
    report = compared_report(compared, first.reference.name, commands=commands, repository=repository)
    files = [renamed(file, one.files) for file, one in zip(report.files, made, strict=False)]
    imatrix = first.imatrix
    return replace(
        report,
        files=(*files, *report.files[len(made) :]),
        provenance=(
            *report.provenance,
            *((f"Scheme of {one.files[0].name}, SHA-256", sha256(one.scheme)) for one in made),
            ("Calibration", f"{imatrix.dataset}, {imatrix.n_tokens:,} tokens in {imatrix.n_sequences:,} sequences"),
            ("Chat template", imatrix.template),
            ("Imatrix, SHA-256", imatrix.sha256),
        ),
        slopes=first.scheme.slopes,
        notes=(*report.notes, *warnings(first.reference)),
    )
