"""Files beside the curve of stock presets: what each is worth at its own size.

Takes measured rows, gives them their equal-size ratios (metrics/equal_size.py has the arithmetic); measures nothing,
makes nothing (stock_curve.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from dynrun.evaluation.kld import Row
from dynrun.metrics.equal_size import EqualSize, equal_size_paired, frontier

IMATRIX_UNKNOWN = "unknown"


@dataclass(frozen=True)
class CurvePoint:
    """A stock file of the curve. ``label``: its preset; ``on_curve`` is false where a smaller file is as good."""

    label: str
    row: Row
    imatrix: str
    on_curve: bool

    def to_json(self) -> dict[str, Any]:
        """As `dynrun compare --json` prints it."""
        return {"label": self.label, "imatrix": self.imatrix, "on_curve": self.on_curve, **self.row.to_json()}


@dataclass(frozen=True)
class Compared:
    """A file. ``imatrix``: what is known of the one it was made with: "same" as the curve's, "other", or
    "unknown", perhaps with what the file says of it; ``equal_size`` is None where there is no curve."""

    label: str
    row: Row
    imatrix: str
    equal_size: EqualSize | None

    def to_json(self) -> dict[str, Any]:
        """As `dynrun compare --json` prints it."""
        return {
            "label": self.label,
            "imatrix": self.imatrix,
            "equal_size_ratio": self.equal_size and self.equal_size.ratio,
            "equal_size_ci95": list(self.equal_size.ci95) if self.equal_size and self.equal_size.ci95 else None,
            "curve_kld": self.equal_size and self.equal_size.curve_kld,
            "extrapolated": self.equal_size and self.equal_size.extrapolated,
            **self.row.to_json(),
        }


@dataclass(frozen=True)
class Comparison:
    """Files against their ``reference``, and the stock ``curve`` by size. ``texts``: what was scored; ``notes``: what
    people should know, a line each."""

    reference: Path
    texts: tuple[str, ...]
    rows: tuple[Compared, ...]
    curve: tuple[CurvePoint, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As `dynrun compare --json` prints it."""
        return {
            "reference": str(self.reference),
            "texts": list(self.texts),
            "rows": [row.to_json() for row in self.rows],
            "curve": [point.to_json() for point in self.curve],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Named:
    """A measured file, its label, and what is known of its imatrix."""

    label: str
    row: Row
    imatrix: str


def compare(
    reference: Path,
    texts: Sequence[str],
    files: Sequence[Named],
    stock: Sequence[Named],
    notes: Sequence[str] = (),
) -> Comparison:
    """Read each file's KLD against the curve through ``stock``; all rows are of the same texts."""
    curve = [(one.row.size_bytes, one.row.clusters) for one in stock]
    kept = set(frontier([(size, clusters.mean) for size, clusters in curve]))
    points = [CurvePoint(one.label, one.row, one.imatrix, i in kept) for i, one in enumerate(stock)]
    rows = [
        Compared(one.label, one.row, one.imatrix, equal_size_paired(one.row.size_bytes, one.row.clusters, curve))
        for one in files
    ]
    return Comparison(
        reference=reference,
        texts=tuple(texts),
        rows=tuple(rows),
        curve=tuple(sorted(points, key=lambda point: point.row.size_bytes)),
        notes=tuple(notes),
    )


def imatrix_of(metadata: Mapping[str, Any], stock_sha256: str | None, wanted_sha256: str | None) -> str:
    """What is known of a file's imatrix beside the one of hash ``wanted_sha256``: "same", "other" or "unknown".

    dynrun's files name theirs by its hash; ``stock_sha256`` is known of stock files of this cache. llama-quantize
    writes the path and the name of the data set: they prove nothing, and are shown.
    """
    own = metadata.get("dynrun.imatrix.sha256", stock_sha256)
    if isinstance(own, str) and wanted_sha256 is not None:
        return "same" if own == wanted_sha256 else "other"
    said = metadata.get("quantize.imatrix.file")
    return f"{IMATRIX_UNKNOWN} ({PurePath(said).name:.60})" if isinstance(said, str) else IMATRIX_UNKNOWN
