"""`dynrun lint`: known faults in a GGUF's metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynrun.cli import options
from dynrun.cli.output import emit, say

if TYPE_CHECKING:
    from dynrun.lint.source import Report

_MARKS = {"error": "BAD ", "warning": "warn", "info": "info"}


def lint(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A GGUF, a name that `dynrun ls` shows, or owner/repo[:QUANT].")
    ],
    quant: Annotated[str, typer.Option("--quant", help="Only this quant of the repository.")] = "",
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="The original's config.json, to compare with.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Known faults in a model's metadata: template, special tokens, context and rope, epsilon, shapes, provenance.

    Reads headers only, remote ones by ranges. Ends with exit code 1 where something is an error.
    Example: dynrun lint unsloth/Llama-4-Scout-17B-16E-Instruct-GGUF --quant Q4_K_M
    """
    from dynrun.errors import NotFoundError

    if config is not None and not config.is_file():
        raise NotFoundError(f"{config} does not exist", fix="check the path of --config")
    reports = _reports(model, quant, config)
    data = {
        "findings": [{**asdict(finding), "name": report.name} for report in reports for finding in report.findings],
        "files": [{"name": report.name, "config": report.config} for report in reports],
    }
    emit(as_json, data, lambda: _show(reports))
    if any(finding.severity == "error" for report in reports for finding in report.findings):
        raise typer.Exit(1)


def _reports(model: str, quant: str, config: Path | None) -> list[Report]:
    from dynrun.cli.ask import ask_which
    from dynrun.hub.variants import choose, matching
    from dynrun.lint.source import lint_file, lint_variants
    from dynrun.models import resolve
    from dynrun.runtime.offers import find_on_hub, is_local

    if is_local(model):
        path = Path(model).expanduser()
        return [lint_file(path if path.is_file() else resolve(model).path, config)]
    found = find_on_hub(model, quant, ask_which)
    if found.note:
        say(found.note)
    # Of a quant that lacks shards that is what is found; `choose` says what there is instead of an unknown one.
    quants = matching(found.shelf, found.name.quant)
    quants = quants or [choose(found.shelf, found.name.quant, found.repository.name)]
    say(f"reading headers of {found.repository.name}")
    return lint_variants(found.repository, quants, say, config)


def _show(reports: Sequence[Report]) -> None:
    from dynrun.report.text import visible

    for report in reports:
        beside = f", beside {visible(report.config)}" if report.config not in ("", "none") else ""
        print(
            f"{visible(report.name)}{beside}: {len(report.findings) or 'no'} finding{'s'[: len(report.findings) != 1]}"
        )
        for finding in report.findings:
            print(f"{_MARKS[finding.severity]}  {finding.id}  {visible(finding.key)}")
            print(f"      expected {finding.expected}")
            print(f"      found    {finding.found}")
