"""A report out of a comparison: files against their reference, beside the curve of stock presets.

Takes what evaluation/compare.py gives, and reads the headers of the files; measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynrun import __version__
from dynrun.artifacts import sha256_file
from dynrun.calibration.dataset import BUILTIN_NAME
from dynrun.errors import DynrunError
from dynrun.evaluation.compare import Comparison
from dynrun.evaluation.kld import Continuation, Row
from dynrun.gguf.header import Header
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.shards import read_whole_header
from dynrun.llamacpp.build import installation
from dynrun.quantize import MODEL_FILE
from dynrun.report.answers import task_results
from dynrun.report.card import card_of
from dynrun.report.data import MADE, OTHER, STOCK, Continued, CurvePoint, Domain, FileResult, Report, Versus
from dynrun.scheme import read_scheme, sha256
from dynrun.scheme_types import Slopes

_OWN = "dynrun.version"
TEXT = "the shipped test conversations, which nothing was calibrated on"


def compared_report(
    comparison: Comparison, model: str, *, commands: Sequence[str] = (), repository: str = ""
) -> Report:
    """All of ``comparison``; ``model`` is what the user calls the reference, ``repository`` the Hub's it came from.

    ``commands`` make it again, without anybody's folders in them. Raises what reading a header raises.
    """
    reference = read_whole_header(comparison.reference)
    files = [_file(one.label, one.row, imatrix=one.imatrix) for one in comparison.rows]
    files = [replace(f, equal_size=one.equal_size) for f, one in zip(files, comparison.rows, strict=True)]
    stock = [_file(f"stock {one.label}", one.row, imatrix=one.imatrix, kind=STOCK) for one in comparison.curve]
    named = _unique([*files, *stock])
    paths = [one.row.file for one in comparison.rows] + [one.row.file for one in comparison.curve]
    score = comparison.rows[0].row.score
    return Report(
        model=model,
        text=", ".join(TEXT if text == BUILTIN_NAME else Path(text).name for text in comparison.texts),
        n_tokens=score.n_tokens,
        ppl_reference=score.ppl_reference,
        files=tuple(named),
        curve=tuple(CurvePoint(p.label, p.row.size_bytes, p.row.kld.mean, p.on_curve) for p in comparison.curve),
        versus=_versus(comparison, named),
        tasks=task_results(comparison.reference, dict(zip((f.name for f in named), paths, strict=True))),
        slopes=_slopes(row.row for row in comparison.rows),
        provenance=_provenance(comparison, reference),
        commands=tuple(commands),
        notes=comparison.notes,
        card=card_of(reference.metadata, repository),
    )


def _file(label: str, row: Row, *, imatrix: str, kind: str = "") -> FileResult:
    header = read_whole_header(row.file)
    domains = [Domain(d.name, d.score.n_tokens, d.score.kld.mean, d.score.kld.ci95) for d in row.domains]
    return FileResult(
        name=label,
        file="made by llama-quantize" if row.file.name == MODEL_FILE else row.file.name,
        kind=kind or (MADE if _OWN in header.metadata else OTHER),
        size_bytes=row.size_bytes,
        bpw=row.bpw,
        kld=row.kld,
        same_top_p=row.same_top_p,
        rms_dp=row.rms_dp,
        ppl=row.ppl,
        domains=tuple(domains),
        continued=_continued(row.continuation) if row.continuation else None,
        sha256=sha256_file(row.file),
        imatrix=imatrix,
        types={name: tensor.type for name, tensor in quantizable(header).items()},
    )


def _continued(along: Continuation) -> Continued:
    return Continued(len(along.parted), along.n_tokens, along.identical, along.median_parted)


def _unique(files: Iterable[FileResult]) -> list[FileResult]:
    """Names are keys of tables and plots."""
    found: dict[str, FileResult] = {}
    for file in files:
        name, n = file.name, 2
        while name in found:
            name, n = f"{file.name} ({n})", n + 1
        found[name] = replace(file, name=name)
    return list(found.values())


def _versus(comparison: Comparison, named: Sequence[FileResult]) -> tuple[Versus, ...]:
    """Each file beside the stock preset nearest in size, where that is within 1%: what was made to be compared."""
    stock = list(zip(named[len(comparison.rows) :], comparison.curve, strict=True))
    found = []
    for file, one in zip(named, comparison.rows, strict=False):
        near = min(stock, key=lambda pair: abs(pair[0].size_bytes - file.size_bytes), default=None)
        if near is None or abs(near[0].size_bytes - file.size_bytes) > 0.01 * file.size_bytes:
            continue
        if (ratio := one.row.ratio_to(near[1].row)) is not None:
            found.append(Versus(file.name, near[0].name, ratio))
    return tuple(found)


def _slopes(rows: Iterable[Row]) -> Slopes:
    """Those of the first file whose own scheme lies beside it: what was measured of the model that they share."""
    for row in rows:
        beside = row.file.with_suffix(".scheme.toml")
        known = read_whole_header(row.file).metadata.get("dynrun.scheme.sha256")
        if known is None or not beside.is_file():
            continue
        try:
            scheme = read_scheme(beside)
        except DynrunError:
            # Somebody's file that happens to be called so.
            continue
        if sha256(scheme) == known and scheme.slopes:
            return scheme.slopes
    return {}


def _provenance(comparison: Comparison, reference: Header) -> tuple[tuple[str, str], ...]:
    metadata: Mapping[str, Any] = reference.metadata
    name = metadata.get("general.name")
    return (
        *([("Model", name)] if isinstance(name, str) and name else []),
        ("Reference", comparison.reference.name),
        ("Reference, SHA-256", sha256_file(comparison.reference)),
        ("llama.cpp", f"{installation().commit}, {installation().backend}"),
        ("dynrun", __version__),
    )
