"""The shipped conversations (written for this project, CC0) and their split in three.

A split is by conversation and stratified by kind, so that no text is in two of them and every kind is in each.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from dynrun.artifacts import sha256_bytes
from dynrun.calibration.conversation import Conversation

Split = Literal["calibration", "probe", "test"]
SPLITS: tuple[Split, ...] = ("calibration", "probe", "test")
# Of ten conversations of a kind: five to calibrate on, two to probe, three to test.
_PATTERN: tuple[Split, ...] = (
    "calibration",
    "test",
    "calibration",
    "probe",
    "calibration",
    "test",
    "calibration",
    "probe",
    "test",
    "calibration",
)


@dataclass(frozen=True)
class Dataset:
    """Conversations and the hash of the bytes they came from."""

    name: str
    sha256: str
    conversations: tuple[Conversation, ...]


def builtin() -> Dataset:
    """The shipped set."""
    folder = files("dynrun.calibration") / "data"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".jsonl"))
    texts = [(folder / name).read_text(encoding="utf-8") for name in names]
    conversations = tuple(_conversation(json.loads(line)) for text in texts for line in text.splitlines())
    return Dataset("builtin", sha256_bytes("".join(texts).encode()), conversations)


def _conversation(record: dict[str, Any]) -> Conversation:
    return Conversation(
        id=record["id"],
        kind=record["kind"],
        messages=record["messages"],
        tools=record.get("tools", []),
        language=record.get("language", "en"),
        document=record.get("document", ""),
        thinking=record.get("thinking"),
    )


def split(conversations: Iterable[Conversation], which: Split) -> list[Conversation]:
    """The conversations of one split, kinds taken in turn so that any beginning of the list covers them all."""
    by_kind: dict[str, list[Conversation]] = defaultdict(list)
    for conversation in conversations:
        by_kind[conversation.kind].append(conversation)
    chosen = []
    for offset, kind in enumerate(sorted(by_kind)):
        # Each kind begins elsewhere in the pattern: small kinds must not all favour the same split.
        ordered = sorted(by_kind[kind], key=lambda c: sha256_bytes(c.id.encode()))
        members = [c for i, c in enumerate(ordered) if _PATTERN[(i + offset * 3) % len(_PATTERN)] == which]
        chosen.append(members)
    turns = max((len(members) for members in chosen), default=0)
    return [members[turn] for turn in range(turns) for members in chosen if turn < len(members)]
