"""The commands, and where each is: a module is imported only where its command is asked for, or for the list of all.

Thirty modules and what typer makes of their options cost a quarter of a command's start (`dynrun pull --help`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module

import typer

# In the order of the help: name, and the function of that name in the module of that name.
_COMMANDS = (
    *("pull", "rm", "make", "convert", "run", "serve", "bench", "ls", "show", "doctor", "demo", "imatrix"),
    *("sensitivity", "allocate", "quantize", "verify", "compare", "push", "plan", "lint", "tui"),
)


@dataclass(frozen=True)
class _Group:
    """``commands``: module and function by name."""

    help: str
    commands: Mapping[str, tuple[str, str]]

    def typer(self) -> typer.Typer:
        """With all its commands."""
        group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=self.help)
        for name, (module, function) in self.commands.items():
            group.command(name)(getattr(import_module(f"dynrun.cli.{module}"), function))
        return group


_GROUPS = {
    "eval": _Group(
        "Measure a model against its reference.",
        {
            "kld": ("eval_kld", "eval_kld"),
            "mmlu": ("eval_mmlu", "eval_mmlu"),
            "task": ("eval_task", "eval_task"),
            "flips": ("eval_flips", "eval_flips"),
            "harness": ("eval_harness", "eval_harness"),
        },
    ),
    "export": _Group(
        "Hand a file to another program on this machine; with --json. Example: dynrun export lmstudio demo:Q3_K_M",
        {"ollama": ("export", "ollama"), "lmstudio": ("export", "lmstudio")},
    ),
    "scheme": _Group(
        "Look at schemes, compare them, take them out of GGUFs; each with --json. Example: dynrun scheme show S.toml",
        {"show": ("scheme", "show"), "diff": ("scheme", "diff"), "from": ("scheme", "from_gguf")},
    ),
}


def add_commands(app: typer.Typer, word: str) -> None:
    """Give ``app`` the command or group called ``word``; all of them where there is none of that name."""
    known = {*_COMMANDS, *_GROUPS}
    wanted = known & {word} or known
    for name in _COMMANDS:
        if name in wanted:
            app.command()(getattr(import_module(f"dynrun.cli.{name}"), name))
    for name, group in _GROUPS.items():
        if name in wanted:
            app.add_typer(group.typer(), name=name)
