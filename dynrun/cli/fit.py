"""`make --fit`: a size from the planner, in the place of --quant, --bpw and --size."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dynrun.cli.output import say
from dynrun.errors import UsageError

FitFlag = Annotated[bool, typer.Option("--fit", help="The largest that this machine holds at a context.")]
FitCtx = Annotated[int, typer.Option("--fit-ctx", min=256, help="With --fit: tokens of context.")]
FitMachine = Annotated[
    Path | None, typer.Option("--machine", metavar="FILE", help="With --fit: another machine, as of dynrun plan.")
]
_SIZES = ("quant", "bpw", "size", "scheme")
_GIB = 1 << 30


def fitting(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the option --fit, and tell it the size that it comes to as ``size``."""
    signature = inspect.signature(command)
    defaults = {"fit": (FitFlag, False), "fit_ctx": (FitCtx, 8192), "machine": (FitMachine, None)}
    added = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)
        for name, (annotation, default) in defaults.items()
    ]
    parameters = list(signature.parameters.values())
    behind = next(index for index, parameter in enumerate(parameters) if parameter.name == "size") + 1
    parameters[behind:behind] = added

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        wanted, n_ctx, machine = (values.pop(name) for name in defaults)
        if wanted:
            values["size"] = str(_size(values, n_ctx, machine))
        elif machine is not None:
            raise UsageError("--machine goes with --fit", fix="add --fit, or leave it out")
        command(**values)

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def _size(values: dict[str, Any], n_ctx: int, path: Path | None) -> int:
    from dynrun.cli.convert import prepare
    from dynrun.models import open_reference
    from dynrun.runtime.fit import fit
    from dynrun.runtime.machine import read_machine
    from dynrun.runtime.placement import Wishes
    from dynrun.runtime.this_machine import this_machine

    if given := [name for name in _SIZES if values.get(name) is not None]:
        raise UsageError(f"--fit and --{given[0]} both say how large the file may be", fix="leave one out")
    values["model"] = prepare(values["model"], values["trust_remote_code"], check=values["check"])
    values["check"] = False
    machine = read_machine(path) if path else this_machine()
    header = open_reference(values["model"]).header
    found = fit(header, machine, Wishes(n_ctx=n_ctx))
    where = {"gpu": "all on the GPU", "gpu+ram": "on the GPU and in RAM", "ram": "in RAM"}[found.placement.verdict]
    speed = f"{found.placement.tokens_per_second:.1f} tokens/s ({found.placement.basis})"
    say(f"fit: {found.size_bytes / _GIB:.2f} GiB, {found.bpw:.2f} bpw; {where} of {machine.name} at {n_ctx}: {speed}")
    return found.size_bytes
