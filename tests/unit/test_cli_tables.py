"""Tables as CSV, Markdown and on a terminal."""

from __future__ import annotations

import csv
import io

import pytest

from dynrun.cli.tables import Table, as_csv, as_markdown, show

TABLE = Table(("file", "size", "more"), (("a|b\nc", "1 MB", "2"), ("[bold]d", "10 MB", "3")), notes=("a [note]",))


def test_csv_joins_names_and_keeps_every_number() -> None:
    records = [
        {"file": "a,b", "kld": {"mean": 0.123456789012, "ci95": [0.1, 0.2]}, "parted": [1, None], "x": None},
        {"file": "c", "kld": {"mean": 1e-9, "ci95": [0.0, 0.3]}, "only": 1},
    ]
    first, second = csv.DictReader(io.StringIO(as_csv(records)))
    assert first == {
        "file": "a,b",
        "kld_mean": "0.123456789012",
        "kld_ci95_low": "0.1",
        "kld_ci95_high": "0.2",
        "x": "",
        "only": "",
    }
    assert (second["kld_mean"], second["only"]) == ("1e-09", "1")


def test_markdown_cells_cannot_end_their_table() -> None:
    assert as_markdown(TABLE).splitlines() == [
        "| file | size | more |",
        "| --- | ---: | ---: |",
        "| a\\|b c | 1 MB | 2 |",
        "| [bold]d | 10 MB | 3 |",
        "",
        "a [note]",
    ]


def test_a_terminal_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    show([TABLE])
    out = capsys.readouterr().out
    assert "[bold]d" in out
    assert "a [note]" in out


def test_a_narrow_terminal_does_without_what_is_dispensable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = Table(("file", "needed", "spare"), (("a", "1" * 90, "2" * 90),), dispensable=("spare",))
    show([wide])
    assert "2" * 90 in capsys.readouterr().out
    monkeypatch.setattr("dynrun.cli.tables._PIPE_WIDTH", 120)
    show([wide])
    out = capsys.readouterr().out
    assert "1" * 90 in out
    assert "spare" not in out
