"""Benches of the past: a line of JSON each, and the new one beside an old one, with the noise of both.

Takes and gives what `dynrun bench --json` prints. Speeds are compared row by row: the same name and size of the file,
the same placement and test; a row without its like is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrun.artifacts import append_line, read_lines, translated_os_errors
from dynrun.errors import MALFORMED, NotFoundError, UsageError
from dynrun.metrics.rates import Change, compared
from dynrun.paths import data_dir

Result = Mapping[str, Any]


def history_file() -> Path:
    """All benches on this machine."""
    return data_dir() / "bench.jsonl"


def keep(result: Result) -> None:
    """Add a bench."""
    path = history_file()
    with translated_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        append_line(path, dict(result))


def kept() -> list[Result]:
    """All benches on this machine, the oldest first."""
    return read_lines(history_file(), _parsed, mend=False)


def last_like(like: Result) -> Result | None:
    """The latest kept bench that has a row of ``like``."""
    return next((result for result in reversed(kept()) if comparisons(result, like)), None)


def read_result(path: Path) -> Result:
    """The bench in a file. Raises NotFoundError where there is none, UsageError where it holds no bench."""
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist", fix="give the file that `dynrun bench --json` wrote, or last")
    try:
        text = path.read_text(encoding="utf-8")
        # One object over many lines, or a history of which the last line counts.
        return _parsed(json.loads(text)) if text.lstrip().startswith("{\n") else _last(text)
    except MALFORMED as error:
        raise UsageError(f"{path} holds no bench", fix="give what `dynrun bench --json` printed") from error


def _last(text: str) -> Result:
    return _parsed(json.loads(text.strip().splitlines()[-1]))


def _parsed(data: Any) -> Result:
    if not isinstance(data, dict):
        raise TypeError(data)
    for row in data["rows"]:
        _key(row)
        if not all(isinstance(speed, int | float) and speed > 0 for speed in row["rounds"]) or not row["rounds"]:
            raise ValueError(row["rounds"])
    return data


def _key(row: Mapping[str, Any]) -> tuple[str, int, str, str]:
    return str(row["model"]), int(row["size_bytes"]), str(row["placement"]), str(row["test"])


@dataclass(frozen=True)
class Compared:
    """A row then and now, in tokens per second."""

    model: str
    placement: str
    test: str
    before: float
    after: float
    change: Change


def comparisons(before: Result, after: Result) -> list[Compared]:
    """Every row that both have."""
    old = {_key(row): row for row in before["rows"]}
    found = []
    for row in after["rows"]:
        if (then := old.get(_key(row))) is not None:
            change = compared(then["rounds"], row["rounds"])
            model, _, placement, test = _key(row)
            found.append(Compared(model, placement, test, then["tokens_per_second"], row["tokens_per_second"], change))
    return found
