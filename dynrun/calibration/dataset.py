"""Sources of calibration text: what all of them are, and the shipped one (written for this project, CC0).

Reads no user's files (files.py, hub.py), splits nothing (splits.py), mixes nothing (mixture.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from dynrun.artifacts import sha256_bytes
from dynrun.calibration.conversation import Conversation

BUILTIN_NAME = "builtin"
# Questions for the model itself (generated.py): no conversations.
_NO_CONVERSATIONS = ("prompts.jsonl",)


@dataclass(frozen=True)
class Source:
    """Conversations from one place, ``name`` as the user wrote it.

    ``conversations`` stand in a pseudo-random order that does not depend on the order in the file, none twice.
    ``n_records`` were read, ``n_malformed`` of them no conversations; ``malformed`` names the first of those, each as
    ``file:line: reason``. ``sha256`` pins the content. ``near_duplicates``: ids of conversations that are too much like
    a held-out one and stay out of what is calibrated or probed on (overlap.py).
    """

    name: str
    sha256: str
    conversations: tuple[Conversation, ...]
    n_records: int = 0
    n_malformed: int = 0
    malformed: tuple[str, ...] = ()
    near_duplicates: frozenset[str] = frozenset()


def builtin() -> Source:
    """The shipped set."""
    folder = files("dynrun.calibration") / "data"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".jsonl"))
    texts = [(folder / name).read_text(encoding="utf-8") for name in names if name not in _NO_CONVERSATIONS]
    # Not splitlines(): a JSON string may hold other line separators as they are.
    found = [_conversation(json.loads(line)) for text in texts for line in text.split("\n") if line.strip()]
    found.sort(key=lambda conversation: sha256_bytes(conversation.id.encode()))
    return Source(BUILTIN_NAME, sha256_bytes("".join(texts).encode()), tuple(found), n_records=len(found))


def _conversation(record: dict[str, Any]) -> Conversation:
    return Conversation(
        id=record["id"],
        kind=record["kind"],
        messages=record.get("messages", []),
        tools=record.get("tools", []),
        language=record.get("language", "en"),
        document=record.get("document", ""),
        text=record.get("text", ""),
        thinking=record.get("thinking"),
    )
