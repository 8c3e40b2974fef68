"""Built-in models that nobody has used yet are made by a child process: in a thread it would slow the app down."""

from __future__ import annotations

import sys


def make_first(model: str) -> None:
    """Make MODEL if it is built in and not there yet. Raises ToolError where that fails."""
    from dynrun.demo.builtin import BUILTIN, builtin_path
    from dynrun.llamacpp.process import capture, new_log

    if model in BUILTIN and not builtin_path(model).is_file():
        capture([sys.executable, "-m", "dynrun.cli.app", "show", model, "--json"], log=new_log("built-in"))
