"""Errors meant for people, and the exit code of each kind.

Standard library only: build.py imports this before anything is installed.
"""

from __future__ import annotations

from pathlib import Path


class DynrunError(Exception):
    """Something went wrong that the user can understand: one line, and what to do next.

    ``message`` says what happened and to which file, ``fix`` what to do, ``log`` where the details are.
    """

    exit_code = 1

    def __init__(self, message: str, *, fix: str = "", log: Path | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix
        self.log = log

    def __str__(self) -> str:
        line = self.message
        if self.fix:
            line += f" — {self.fix}"
        if self.log is not None:
            line += f" (log: {self.log})"
        return line


class UsageError(DynrunError):
    """The command line or an input file asks for something that makes no sense."""

    exit_code = 2


class NetworkError(DynrunError):
    """The network failed; trying again may help."""

    exit_code = 3


class NotFoundError(DynrunError):
    """A model, file or repository does not exist, or access to it is gated."""

    exit_code = 4


class DoesNotFitError(DynrunError):
    """The size asked for, the memory or the disk is too small."""

    exit_code = 5


INTERRUPTED_EXIT_CODE = 130
# What it ends in to read data of another shape than expected, beside KeyboardInterrupt and the like.
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
