"""The folder of a report: the page, the card with its pictures, and the data that both are made of.

``report.html`` stands alone; ``README.md`` is the card, with ``plots/``; ``report.json`` is read back by
:func:`read_report`. Each file appears whole or not at all, ``report.json`` last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from dynrun.artifacts import atomic_path, translated_os_errors, write_json, write_text
from dynrun.errors import DynrunError, NotFoundError, UsageError
from dynrun.report import page
from dynrun.report.data import Report
from dynrun.report.stored import rebuilt

PAGE, CARD, DATA, PLOTS = "report.html", "README.md", "report.json", "plots"
_FORMAT = 1
# What an earlier report left and this one has not; nothing else of the user's folder is touched.
_OURS = re.compile(r"(kld-(size|domains|percentiles)|task-\d+|(types-\d+|slopes)(-\d+)?)\.(png|svg)")


@dataclass(frozen=True)
class Written:
    """A report on disk."""

    folder: Path
    page: Path
    card: Path
    plots: tuple[Path, ...]


def write_report(report: Report, folder: Path) -> Written:
    """Write all of it to ``folder``: the same bytes for the same report."""
    drawn = page.draw(report)
    plots = []
    for plot in drawn.all:
        path = folder / PLOTS / f"{plot.name}.png"
        with atomic_path(path) as temporary:
            temporary.write_bytes(plot.png)
        write_text(path.with_suffix(".svg"), f'<?xml version="1.0" encoding="utf-8"?>\n{plot.svg}\n')
        plots.append(path)
    _tidy(folder / PLOTS, plots)
    write_text(folder / PAGE, page.html(report, drawn))
    write_text(folder / CARD, page.card(report, drawn))
    write_json(folder / DATA, {"format": _FORMAT, "report": asdict(report)})
    return Written(folder, folder / PAGE, folder / CARD, tuple(plots))


def _tidy(folder: Path, plots: Iterable[Path]) -> None:
    kept = {path.stem for path in plots}
    with translated_os_errors(folder):
        for path in folder.iterdir() if folder.is_dir() else ():
            if _OURS.fullmatch(path.name) and path.stem not in kept:
                path.unlink()


def read_report(path: Path) -> Report:
    """The report in a folder (or its ``report.json``).

    Raises NotFoundError where there is none, UsageError where it is of another format or no report.
    """
    path = path / DATA if path.is_dir() else path
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist", fix="give a folder that make or compare wrote a report to")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError("it is of another format")
        return rebuilt(Report, data.get("report"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no report of this dynrun: {error}", fix="make the report again") from error
    except OSError as error:
        raise DynrunError(f"{path} cannot be read: {error.strerror}", fix="check its permissions") from error
