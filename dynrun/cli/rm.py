"""`dynrun rm`: take a model off this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynrun.cli import options
from dynrun.cli.ask import ask_yes
from dynrun.cli.output import emit, say
from dynrun.errors import UsageError
from dynrun.hub.files import amount

if TYPE_CHECKING:
    from dynrun.hub.local import Removal
    from dynrun.leftovers import Leftovers
    from dynrun.models import Kept


def rm(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name that `dynrun ls` shows, or owner/repo:QUANT.")
    ] = "",
    cache: Annotated[
        bool, typer.Option("--cache", help="What stages of `make` and `eval` left; models and stored answers stay.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="All that is here of owner/repo.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and what that frees.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Remove a model that was pulled or made, or intermediate results, and say what that frees; what other models share
    stays.

    Example: dynrun rm unsloth/Llama-4-Scout-17B-16E-Instruct-GGUF:UD-IQ2_XXS
    """
    removal = _removal(model, cache, everything)
    for name in removal.names:
        say(name)
    # Before it is gone.
    freed = removal.freed_bytes
    data = {"names": list(removal.names), "freed_bytes": freed, "removed": not dry_run}
    if dry_run:
        emit(as_json, data, lambda: print(f"would free {amount(freed)}"))
        return
    if not yes and not ask_yes(f"remove this, which frees {amount(freed)}?", enter=False):
        raise UsageError("nothing was removed")
    removal.execute()
    emit(as_json, data, lambda: print(f"freed {amount(freed)}"))


def _removal(model: str, cache: bool, everything: bool) -> Kept | Removal | Leftovers:
    """What the options name. Raises UsageError where that is nothing or two things."""
    from dynrun.leftovers import leftovers
    from dynrun.models import kept

    if cache:
        if model or everything:
            raise UsageError("--cache removes no model", fix="give --cache alone, then the model")
        return leftovers()
    if not model:
        raise UsageError("no model to remove", fix="name one that dynrun ls shows, or give --cache")
    return kept(model) or _of_hub(model, everything)


def _of_hub(model: str, everything: bool) -> Kept | Removal:
    """What is here of a model of the Hub. Raises NotFoundError, AmbiguousError, UsageError for other files."""
    from dynrun.hub.local import find_local, plan_removal
    from dynrun.hub.resolve import parse_name

    if Path(model).expanduser().exists():
        raise UsageError(f"{model} is a file of yours, in no cache of dynrun", fix="delete it yourself")
    name = parse_name(model)
    if everything:
        return plan_removal(name.repository, None)
    local = find_local(name)
    return plan_removal(local.repository, [file.path for file in local.variant.files])
