"""`dynrun pull`: a model of the Hub, into the cache that all programs share."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options
from dynrun.cli.ask import ask_which, ask_yes, somebody_is_there
from dynrun.cli.output import emit, say
from dynrun.errors import INTERRUPTED_EXIT_CODE, DynrunError, NetworkError
from dynrun.hub.files import amount

if TYPE_CHECKING:
    from dynrun.hub.files import RemoteFile, Variant
    from dynrun.hub.local import LocalModel
    from dynrun.hub.pull import Pulled
    from dynrun.hub.resolve import Found, HubName

_WORTH = {"mmproj": "lets the model see images", "mtp": "drafts tokens, which makes it faster"}


class InterruptedPullError(DynrunError):
    """Ctrl+C: everything that came is kept."""

    exit_code = INTERRUPTED_EXIT_CODE


def pull(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="owner/repo, owner/repo:QUANT, or an address of the Hub.")
    ],
    quant: Annotated[
        str, typer.Option("--quant", help="Which of its quants, as Q4_K_M or UD-IQ2_XXS; or a file.")
    ] = "",
    mmproj: Annotated[bool | None, typer.Option("--mmproj/--no-mmproj", help="Its image encoder too.")] = None,
    mtp: Annotated[bool | None, typer.Option("--mtp/--no-mtp", help="Its draft of further tokens too.")] = None,
    connections: Annotated[int, typer.Option("--connections", min=1, max=64, help="Connections at a time.")] = 8,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be downloaded.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Download a model from the Hugging Face Hub, checked by its hashes; what came is kept, whatever happens.

    Example: dynrun pull unsloth/Llama-4-Scout --quant IQ2_XXS
    """
    from dynrun.hub.resolve import parse_name

    path = Path(model).expanduser()
    if path.is_file():
        say(f"{path} is on this machine already")
        emit(as_json, _data([(path.resolve(), path.stat().st_size, "")]), lambda: print(path.resolve()))
        return
    name = parse_name(model, quant)
    try:
        name, revision, files = _choose(name, {"mmproj": mmproj, "mtp": mtp})
    except NetworkError as error:
        local = _instead(name, error)
        emit(as_json, _data([(local.path, local.variant.size, "")]), lambda: print(local.path))
        return
    if dry_run:
        _plan(files, as_json=as_json)
    else:
        _report(name, _pull(name, files, revision, connections), as_json=as_json)


def _report(name: HubName, pulled: Pulled, *, as_json: bool) -> None:
    before = f", after {amount(pulled.resumed_bytes)} that were here already" if pulled.resumed_bytes else ""
    say(f"{amount(pulled.fetched_bytes)} in {pulled.elapsed_s:.1f} s{before}")
    say(f"run it: {shlex.join(['dynrun', 'run', str(name)])}")
    found = [(file.path, file.size_bytes, file.sha256) for file in pulled.files]
    data = _data(found, name, pulled.resumed_bytes, pulled.elapsed_s)
    emit(as_json, data, lambda: print(pulled.files[0].path))


def _choose(name: HubName, wanted: dict[str, bool | None]) -> tuple[HubName, str, list[RemoteFile]]:
    """The quant by its full name, the revision that it is of, and all files to download."""
    from dynrun.hub.resolve import find

    found = find(name, ask_which)
    if found.note:
        say(found.note)
    variant = _variant(found)
    exact = replace(found.name, repository=found.repository.name, quant=_quant(found, variant))
    say(f"{exact}: {_shards(variant)}{amount(variant.size)}, commit {found.repository.commit[:8]}")
    files = list(variant.files)
    for kind, wish in wanted.items():
        files += _companion(found, kind, variant, wish)
    return exact, found.repository.revision, files


def _variant(found: Found) -> Variant:
    """What the name says, or what the user chooses."""
    from dynrun.hub.variants import AmbiguousError, choose

    try:
        return choose(found.shelf, found.name.quant, found.repository.name)
    except AmbiguousError as error:
        if not somebody_is_there():
            raise
        options = {f"{v.first.path if found.name.quant else v.label}  {amount(v.size)}": v for v in error.found}
        return options[ask_which(f"{found.repository.name} has several; which one?", list(options))]


def _quant(found: Found, variant: Variant) -> str:
    """What names ``variant`` and nothing else: its label, or its file where two have the same."""
    same = [other for other in found.shelf.quants if other.label == variant.label]
    return variant.label if same == [variant] else variant.first.path


def _shards(variant: Variant) -> str:
    return f"{len(variant.files)} shards, " if len(variant.files) > 1 else ""


def _companion(found: Found, kind: str, variant: Variant, wish: bool | None) -> list[RemoteFile]:
    """The files of what goes beside the model, if it is wanted; said where nobody can be asked."""
    from dynrun.errors import NotFoundError
    from dynrun.hub.variants import best_companion

    best = best_companion(found.shelf, kind, variant)
    if best is None:
        if wish:
            raise NotFoundError(f"{found.repository.name} has no {kind} file", fix=f"leave --{kind} out")
        return []
    if wish is None and somebody_is_there():
        wish = ask_yes(f"{best.first.name} ({amount(best.size)}) {_WORTH[kind]}; download it too?", enter=True)
    elif wish is None:
        say(f"{best.first.name} ({amount(best.size)}) {_WORTH[kind]}: add --{kind} to download it too")
    return list(best.files) if wish else []


def _instead(name: HubName, error: NetworkError) -> LocalModel:
    """What is here already, where the Hub cannot be reached. Raises ``error`` where nothing is."""
    from dynrun.hub.local import find_local

    try:
        local = find_local(name)
    except DynrunError:
        raise error from None
    say(f"{error.message}; {local.name} is on this machine already")
    return local


def _pull(name: HubName, files: Sequence[RemoteFile], revision: str, connections: int) -> Pulled:
    from dynrun.cli.transfer_bars import transfer_bars
    from dynrun.hub.pull import pull
    from dynrun.hub.transfer import TransferSettings
    from dynrun.hub.variants import companion_kind

    try:
        with transfer_bars() as bars:
            return pull(files, revision, settings=TransferSettings(connections), watch=bars, say=say)
    except KeyboardInterrupt:
        kinds = sorted({companion_kind(file.path) for file in files} & _WORTH.keys())
        again = shlex.join(["dynrun", "pull", str(name), *(f"--{kind}" for kind in kinds)])
        raise InterruptedPullError("interrupted; what came is kept", fix=f"go on with: {again}") from None


def _plan(files: Sequence[RemoteFile], *, as_json: bool) -> None:
    from dynrun.hub.cache import has_blob, snapshot_path

    rows = [(file, has_blob(file)) for file in files]
    data = {
        "files": [
            {"path": str(snapshot_path(f)), "size_bytes": f.size, "sha256": f.sha256, "url": f.url, "here": here}
            for f, here in rows
        ],
        "download_bytes": sum(file.size for file, here in rows if not here),
    }

    def show() -> None:
        for file, here in rows:
            print(f"{'here' if here else 'download'}\t{file.size}\t{file.path}\t{file.sha256}")

    emit(as_json, data, show)


def _data(
    files: Sequence[tuple[Path, int, str]], name: HubName | None = None, resumed: int = 0, elapsed_s: float = 0.0
) -> dict[str, Any]:
    return {
        "name": str(name) if name else "",
        "files": [{"path": str(path), "size_bytes": size, "sha256": sha256} for path, size, sha256 in files],
        "resumed_bytes": resumed,
        "elapsed_s": round(elapsed_s, 3),
    }
