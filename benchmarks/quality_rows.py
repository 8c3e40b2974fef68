"""The measured cells of benchmarks/quality.py: one CSV row each, on disk before the next is measured.

Takes rows, gives them back after a kill; measures nothing.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dynrun.artifacts import write_text
from dynrun.errors import DynrunError
from dynrun.metrics.intervals import Clusters, Ratio, paired_ratio

CSV_FILE = "quality.csv"
# Plain: as llama-quantize rounds. With feedback: dynrun/rounding.
STOCK = "stock"
STOCK_FEEDBACK = "stock+feedback"
OURS = "ours"
OURS_PLAIN = "ours/plain"
NO_FEEDBACK = "no-feedback"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One file on one text: ``kld`` in nats per token, ``kld_ratio`` to the stock preset's with its paired 95% interval
    (None where that is not measured), ``predicted_kld`` None where the method predicts none.

    ``made_s``: seconds to choose the types and make the file, the same on every text; ``rounded_s``: those of them in
    which the file was made with feedback (None without), where tensors that the choice or another file has rounded
    already are found again; ``seconds`` to measure on this text; ``key`` hashes what cells must share to be compared;
    ``sums`` and ``counts`` are the KLD per sequence, for ratios after the file is deleted.
    """

    model: str
    label: str
    method: str
    seed: int | None
    text: str
    bytes: int
    budget_bytes: int
    bpw: float
    kld: float
    kld_low: float
    kld_high: float
    kld_ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    same_top_p: float
    predicted_kld: float | None
    made_s: float
    rounded_s: float | None = None
    seconds: float
    key: str
    sums: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def place(self) -> tuple[str, str, str, int | None, str]:
        """What names the cell."""
        return self.model, self.label, self.method, self.seed, self.text

    @property
    def name(self) -> str:
        """The method, with its seed."""
        return method_name(self.method, self.seed)

    def ratio_to(self, other: Cell) -> Ratio | None:
        """Mean KLD over ``other``'s, paired by sequence; None where that is zero or depends on something else."""
        if self.key != other.key:
            return None
        return paired_ratio(self.clusters, other.clusters)

    @property
    def clusters(self) -> Clusters:
        """The sums of KLD per sequence."""
        return Clusters(self.sums, self.counts)


_COLUMNS = tuple(field.name for field in fields(Cell))
_INTEGERS = frozenset({"seed", "bytes", "budget_bytes"})
_TEXTS = frozenset({"model", "label", "method", "text", "key"})
# Older files are without.
_NEW = frozenset({"rounded_s"})
_HEADER = ",".join(_COLUMNS) + "\n"


def method_name(method: str, seed: int | None) -> str:
    """As in tables: ``random:3``, ``ours``."""
    return method if seed is None else f"{method}:{seed}"


def append(folder: Path, cell: Cell) -> None:
    """Add a row; it is on the disk when this returns."""
    path = folder / CSV_FILE
    folder.mkdir(parents=True, exist_ok=True)
    if not _has_header(path):
        _write(folder, load(folder))
    with path.open("a", encoding="utf-8", newline="") as stream:
        stream.write(_line(cell))
        stream.flush()
        os.fsync(stream.fileno())


def load(folder: Path) -> list[Cell]:
    """All rows, the last one of each place; a line torn by a kill is cut off. Raises DynrunError for a bad file."""
    path = folder / CSV_FILE
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        text = stream.read()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    try:
        cells = [_cell(row) for row in csv.DictReader(io.StringIO(whole, newline=""), strict=True)]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise DynrunError(f"{path} is no CSV of this benchmark: {error}", fix="use a new --out") from error
    return list({cell.place: cell for cell in cells}.values())


def drop(folder: Path, model: str, labels: Collection[str], methods: Collection[str]) -> None:
    """Forget the rows of ``model`` with one of ``labels`` and one of ``methods``."""
    cells = load(folder)
    kept = [c for c in cells if c.model != model or c.label not in labels or c.method not in methods]
    if len(kept) < len(cells):
        _write(folder, kept)


def _has_header(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", newline="") as stream:
        return stream.readline() == _HEADER


def _write(folder: Path, cells: Iterable[Cell]) -> None:
    write_text(folder / CSV_FILE, _HEADER + "".join(map(_line, cells)))


def _line(cell: Cell) -> str:
    row: dict[str, Any] = asdict(cell)
    row |= {name: json.dumps(row[name]) for name in ("sums", "counts")}
    stream = io.StringIO(newline="")
    # repr of a float is exact: what is read back is what was measured.
    csv.writer(stream, lineterminator="\n").writerow("" if row[name] is None else row[name] for name in _COLUMNS)
    return stream.getvalue()


def _cell(row: dict[str, str]) -> Cell:
    values: dict[str, Any] = {}
    for name in _COLUMNS:
        text = row.get(name, "") if name in _NEW else row[name]
        if name in ("sums", "counts"):
            values[name] = tuple(json.loads(text))
        elif name in _TEXTS:
            values[name] = text
        elif text == "":
            values[name] = None
        else:
            values[name] = int(text) if name in _INTEGERS else float(text)
    return Cell(**values)
