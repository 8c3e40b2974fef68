"""Questions to the user: on a terminal they are asked, elsewhere they end in exit code 2 with what can be answered."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dynrun.cli.output import say
from dynrun.errors import UsageError


def somebody_is_there() -> bool:
    """Whether a question can be asked."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def ask_which(question: str, options: Sequence[str]) -> str:
    """The one of ``options`` that the user chooses. Raises UsageError where nobody is there, or nothing is chosen."""
    if not somebody_is_there():
        raise UsageError(question, fix=f"name one: {', '.join(options)}")
    say(question)
    for number, option in enumerate(options, 1):
        say(f"{number:3}  {option}")
    print(f"1 to {len(options)}: ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline().strip()
    if answer in options:
        return answer
    if answer.isdecimal() and 1 <= int(answer) <= len(options):
        return options[int(answer) - 1]
    raise UsageError("none was chosen", fix=f"name one: {', '.join(options)}")


def ask_yes(question: str, *, enter: bool) -> bool:
    """Whether the user says yes; ``enter`` is what Enter alone means. Raises UsageError where nobody is there."""
    if not somebody_is_there():
        raise UsageError(question, fix="say so with --yes")
    print(f"{question} {'[Y/n]' if enter else '[y/N]'} ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline().strip().lower()
    return answer in ("y", "yes") if answer else enter
