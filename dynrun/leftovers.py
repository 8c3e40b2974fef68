"""What stages left in the cache, and how it is taken away: all of it can be made again from the models.

Models that `dynrun ls` shows stay, as they have names of their own there; so do answers to questions, which flips are
counted from and which take hours.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dynrun.artifacts import MANIFEST, discard, freed_bytes, lock_if_free
from dynrun.errors import DynrunError
from dynrun.paths import models_dir, stages_dir

_KEPT = ("answers",)


@dataclass(frozen=True)
class Leftovers:
    """``folders`` of results, whole or begun, by the stage that made them, and the bytes that each stage's free."""

    folders: dict[str, list[Path]]
    freed: dict[str, int]

    @property
    def names(self) -> tuple[str, ...]:
        """A line a stage, the largest first."""
        largest = sorted(self.freed.items(), key=lambda item: -item[1])
        return tuple(f"{name}: {len(self.folders[name])}, {n / 1e9:.2f} GB" for name, n in largest)

    @property
    def freed_bytes(self) -> int:
        return sum(self.freed.values())

    def execute(self) -> None:
        """Take all of it away. Raises DynrunError, and takes nothing, while a process works on any of it."""
        folders = [folder for found in self.folders.values() for folder in found]
        with ExitStack() as held:
            for folder in folders:
                if not held.enter_context(lock_if_free(folder.with_suffix(".lock"))):
                    raise DynrunError(f"another dynrun works on {folder}", fix="wait for it to end")
            for folder in folders:
                discard(folder, MANIFEST)


def leftovers() -> Leftovers:
    """What is there now."""
    found: dict[str, list[Path]] = defaultdict(list)
    for folder in sorted((*stages_dir().glob("*/*"), *(models_dir() / "joined").glob("*"))):
        if folder.is_dir() and folder.parent.name not in _KEPT:
            found[folder.parent.name].append(folder)
    return Leftovers(dict(found), {name: freed_bytes(folders) for name, folders in found.items()})
