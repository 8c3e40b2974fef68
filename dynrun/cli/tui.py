"""`dynrun tui`, and `dynrun` alone: the app."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from dynrun.cli.output import say
from dynrun.errors import UsageError

_ROOMS = ("models", "plan", "chat", "make", "bench")


def tui(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="A model to begin with.")] = "",
    room: Annotated[str, typer.Option("--room", help=f"Where to begin: {', '.join(_ROOMS)}.")] = "",
    web: Annotated[bool, typer.Option("--web", help="Serve it to a browser on this machine.")] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Of --web; 0 takes any free one.")] = 0,
) -> None:
    """Open the app: find models, see what fits, download, make, chat, measure.

    Example: dynrun tui demo --room chat
    """
    if room and room not in _ROOMS:
        raise UsageError(f"there is no room {room!r}", fix=f"one of {', '.join(_ROOMS)}")
    if web:
        from dynrun.tui.web import serve

        serve(port, (*((model,) if model else ()), *(("--room", room) if room else ())), say)
        return
    # A driver of Textual's that is named needs none: that of --web.
    if not on_terminal() and "TEXTUAL_DRIVER" not in os.environ:
        raise UsageError("the app needs a terminal", fix="see `dynrun --help` for commands that do without one")
    from dynrun.tui.app import run_app
    from dynrun.tui.messages import Visit

    mode = room or ("plan" if model else "models")
    raise typer.Exit(run_app(Visit(mode, model) if model or room else None))


def on_terminal() -> bool:
    """Whether both standard input and output are a terminal."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
