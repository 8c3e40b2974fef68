"""Tables of results as people want them: on a terminal, as Markdown, as CSV.

Takes cells that are text already, or plain data for CSV; measures and rounds nothing.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

from dynrun.cli.output import emit, say
from dynrun.errors import UsageError

AsCsv = Annotated[bool, typer.Option("--csv", help="CSV on stdout: every number, a line a file and text.")]
AsMarkdown = Annotated[bool, typer.Option("--md", help="The tables as Markdown on stdout.")]
Form = Literal["table", "json", "csv", "md"]
# What a pipe is as wide as: it has no width, and rich would wrap every cell at 80 columns.
_PIPE_WIDTH = 200


@dataclass(frozen=True)
class Table:
    """``headings`` with rows of as many cells; the first column is text, the others are numbers. ``notes`` below."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    notes: tuple[str, ...] = ()
    # Columns that a narrow terminal can do without.
    dispensable: tuple[str, ...] = ()

    def without(self, headings: Sequence[str]) -> Table:
        """Fewer columns."""
        kept = [i for i, heading in enumerate(self.headings) if heading not in headings]
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return Table(tuple(self.headings[i] for i in kept), rows, self.title, self.notes)


def form_of(as_json: bool, as_csv: bool, as_md: bool) -> Form:
    """The one that is asked for. Raises UsageError for several."""
    wanted: dict[Form, bool] = {"json": as_json, "csv": as_csv, "md": as_md}
    chosen = [form for form, asked in wanted.items() if asked]
    if len(chosen) > 1:
        raise UsageError("only one of --json, --csv and --md can be printed", fix="leave the others out")
    return chosen[0] if chosen else "table"


def print_in(
    form: Form, data: Mapping[str, Any], records: Callable[[], Iterable[Mapping[str, Any]]], tables: Sequence[Table]
) -> None:
    """``data`` as JSON, ``records`` as CSV, or ``tables``."""
    if form == "csv":
        print(as_csv(records()), end="")
    elif form == "md":
        print("\n".join(map(as_markdown, tables)), end="")
    else:
        emit(form == "json", data, lambda: show(tables))


def note(lines: Iterable[str]) -> None:
    """What people should know, on stderr."""
    for line in lines:
        say(f"note: {line}")


def as_csv(records: Iterable[Mapping[str, Any]]) -> str:
    """A heading line and a line a record; nested values get joined names, intervals ``_low`` and ``_high``."""
    flat = [_flat(record) for record in records]
    names = list(dict.fromkeys(name for record in flat for name in record))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Lists that are no intervals have no place in a line, and are left out."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= _flat(value, f"{name}_")
        elif isinstance(value, list):
            if key.endswith("ci95") and len(value) == 2:
                found |= {f"{name}_low": value[0], f"{name}_high": value[1]}
        else:
            found[name] = value
    return found


def as_markdown(table: Table) -> str:
    """A table of GitHub's Markdown; what a cell holds cannot end it."""
    align = ["---", *["---:"] * (len(table.headings) - 1)]
    lines = [_line(table.headings), _line(align), *map(_line, table.rows)]
    title = [f"**{table.title}**", ""] if table.title else []
    notes = ["", *table.notes] if table.notes else []
    return "\n".join([*title, *lines, *notes]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def show(tables: Sequence[Table]) -> None:
    """On a terminal, by rich; without the dispensable columns where it is narrow."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)
    for i, table in enumerate(tables):
        fitting = table if _width(table) <= console.width else table.without(table.dispensable)
        shown = RichTable(box=None, pad_edge=False, header_style="bold", title=escape(table.title) or None)
        shown.title_justify, shown.title_style = "left", "bold"
        shown.add_column(fitting.headings[0], overflow="fold")
        for heading in fitting.headings[1:]:
            shown.add_column(heading, justify="right")
        for row in fitting.rows:
            shown.add_row(*map(escape, row))
        if i:
            console.print()
        console.print(shown)
        if fitting.notes:
            console.print()
        for line in fitting.notes:
            console.print(line, markup=False)


def _width(table: Table) -> int:
    columns = zip(table.headings, *table.rows, strict=True)
    return sum(max(map(len, column)) + 2 for column in columns)
