"""`dynrun ls`: the models on this machine."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dynrun.cli.output import emit, megabytes, say

if TYPE_CHECKING:
    from dynrun.models import Listed


def ls(as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False) -> None:
    """List the models on this machine: the built-in ones that were made, and what `make` made.

    Example: dynrun ls --json
    """
    from dynrun.models import list_models

    models = list_models()
    rows = [{**asdict(model), "path": str(model.path)} for model in models]

    def show() -> None:
        if not models:
            say('no models yet; get one: dynrun run demo -p "Hello"')
            return
        if sys.stdout.isatty():
            _table(models)
            return
        for model in models:
            print(model.name, model.size_bytes, model.quant, model.architecture, model.path, sep="\t")

    emit(as_json, {"models": rows}, show)


def _table(models: list[Listed]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("quant", no_wrap=True)
    table.add_column("architecture", no_wrap=True)
    table.add_column("path", overflow="fold")
    for model in models:
        table.add_row(model.name, megabytes(model.size_bytes), model.quant, model.architecture, str(model.path))
    Console().print(table, highlight=False)
