"""`dynrun export`: hand a file to Ollama or LM Studio on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options
from dynrun.cli.output import emit

if TYPE_CHECKING:
    from dynrun.publish.export import Exported

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF, or a name that `dynrun ls` shows.")]
Name = Annotated[str, typer.Option("--name", help="What it is called there (default: the file's own name).")]


def ollama(
    model: Model,
    name: Name = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the Modelfile (default: the cache).")
    ] = None,
    no_create: Annotated[bool, typer.Option("--no-create", help="Write the Modelfile only.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Write a Modelfile with the maker's recommended sampling, and have Ollama take the model where it is installed.

    Example: dynrun export ollama demo:Q3_K_M --name demo-small
    """
    from dynrun.models import resolve
    from dynrun.paths import cache_dir
    from dynrun.publish.export import export_ollama

    found = resolve(model)
    called = name or _called(found.path)
    folder = out or cache_dir() / "exports" / "ollama" / called.lower()
    done = export_ollama(found.path, called, folder, run=not no_create)
    emit(as_json, _to_json(done), lambda: _show(done))


def lmstudio(
    model: Model,
    name: Name = "",
    publisher: Annotated[str, typer.Option("--publisher", help="The folder above it there.")] = "dynrun",
    models: Annotated[
        Path | None, typer.Option("--models", metavar="DIR", help="LM Studio's folder of models (default: its own).")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Put the file (its shards, its mmproj) where LM Studio lists it, linked where the disk allows it.

    Example: dynrun export lmstudio demo:Q3_K_M
    """
    from dynrun.models import resolve
    from dynrun.publish.export import export_lmstudio

    found = resolve(model)
    done = export_lmstudio(found.path, publisher, name or _called(found.path), models)
    emit(as_json, _to_json(done), lambda: _show(done))


def _called(path: Path) -> str:
    from dynrun.gguf.shards import split_name

    return split_name(path)


def _to_json(exported: Exported) -> dict[str, Any]:
    return {
        "program": exported.program,
        "name": exported.name,
        "files": list(map(str, exported.files)),
        "command": exported.command,
        "done": exported.done,
        "url": None,
    }


def _show(exported: Exported) -> None:
    for path in exported.files:
        print(f"file    {path}")
    print(f"{'next' if exported.done else 'to do':7} {exported.command}")
