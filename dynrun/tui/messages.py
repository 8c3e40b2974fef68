"""What workers and widgets tell screens: messages that nobody may change once they are made.

Textual stamps a message after making it, so a frozen dataclass cannot be one; :class:`Frozen` freezes its fields only.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textual.message import Message

if TYPE_CHECKING:
    from dynrun.runtime.placement import Placement

_STAMPS = frozenset(Message.__slots__)


class Frozen(Message):
    """A message whose fields are set once. Subclasses are dataclasses with ``eq=False``."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _STAMPS and name in self.__dict__:
            raise FrozenInstanceError(f"{type(self).__name__}.{name} is set already")
        super().__setattr__(name, value)


@dataclass(eq=False)
class Visit(Frozen):
    """Somebody wants another room, to do something with a model there.

    ``mode``: models, plan, chat, make or bench. ``model``: MODEL as every command takes it; empty: just go there.
    ``placement``: as planned, for chat and bench. ``path``: for plan and bench the model's file, where it is known; for
    chat a file to attach.
    """

    mode: str
    model: str = ""
    placement: Placement | None = None
    path: Path | None = None


@dataclass(eq=False)
class ModelsChanged(Frozen):
    """A model was added to this machine, or removed. The app tells every room that is open."""


@dataclass(eq=False)
class JobDone(Frozen):
    """Work in the worker group ``group`` ended; ``result`` is what it gave."""

    group: str
    name: str
    result: Any = None


@dataclass(eq=False)
class JobFailed(Frozen):
    """Work in the worker group ``group`` failed. ``message`` is a line for people, as the command would print it."""

    group: str
    name: str
    message: str
    exit_code: int = 1


@dataclass(eq=False)
class JobStopped(Frozen):
    """Work in the worker group ``group`` was stopped by the user."""

    group: str
    name: str
