"""The command that is being run, as a report may print it: to do the same again, on any machine."""

from __future__ import annotations

import re
import shlex
from contextvars import ContextVar

ARGUMENTS: ContextVar[tuple[str, ...]] = ContextVar("arguments", default=())
# Folders at the beginning of a path that is an argument, an option's value or one of a list.
_FOLDERS = re.compile(r"(?P<before>^|[=,])(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[^,=]*[/\\])?")
# What says how to print, not what to do.
_LEFT_OUT = ("--json", "--csv", "--md")


def command_line() -> list[str]:
    """The command as one line, or none where no command is run; the user's folders are taken off their files."""
    arguments = [one for one in ARGUMENTS.get() if one not in _LEFT_OUT]
    return [shlex.join(["dynrun", *map(without_folders, arguments)])] if arguments else []


def without_folders(argument: str) -> str:
    """``/home/me/model.gguf`` is ``model.gguf``; ``owner/repo`` and URLs stay."""
    return _FOLDERS.sub(lambda match: match["before"], argument)
