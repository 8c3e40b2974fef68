"""Placements that worked where larger ones ran out of memory, on disk, for this model, machine, build and wishes.

Takes and gives a :class:`Choice`. Plans nothing, and knows no other reason to prefer a placement.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynrun.artifacts import key_of, sha256_bytes, write_json
from dynrun.errors import MALFORMED, UsageError
from dynrun.gguf.header import read_header
from dynrun.llamacpp.build import installation
from dynrun.paths import cache_dir
from dynrun.runtime.machine import Machine
from dynrun.runtime.placement import Choice, Wishes, choice_from_json

# Enough to tell two models apart, and two quants of one: metadata and tensor table lie at the beginning.
_HEAD_BYTES = 1 << 24


@dataclass(frozen=True)
class Remembered:
    """The place of one memory."""

    path: Path

    def choice(self) -> Choice | None:
        """What worked; None where nothing is kept, or what is kept is no choice."""
        try:
            return choice_from_json(json.loads(self.path.read_text(encoding="utf-8"))["choice"])
        except (OSError, UsageError, *MALFORMED):
            return None

    def keep(self, choice: Choice) -> None:
        """Remember ``choice``."""
        write_json(self.path, {"choice": choice.to_json()})

    def forget(self) -> None:
        """Plan anew next time."""
        self.path.unlink(missing_ok=True)


def remembered(model: Path, machine: Machine, wishes: Wishes, rpc: Sequence[str] = ()) -> Remembered:
    """The memory for ``model`` as it is to run here."""
    devices = [[d.name, d.description, d.total_bytes] for d in machine.devices]
    asked = {**vars(wishes), "mmproj": str(wishes.mmproj)}
    facts = {
        "model": _identity(model),
        "devices": devices,
        "ram": machine.ram_bytes,
        "rpc": list(rpc),
        "build": installation().fingerprint,
        "wishes": asked,
    }
    return Remembered(cache_dir() / "placements" / f"{key_of(facts)}.json")


def _identity(model: Path) -> str:
    header = read_header(model)
    with model.open("rb") as stream:
        head = stream.read(min(header.data_offset, _HEAD_BYTES))
    return f"{sha256_bytes(head)} {header.file_bytes}"
