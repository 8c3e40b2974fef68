"""The split in three: what is calibrated on, what slopes are probed on, what proves the result.

Takes a source, gives the conversations of one part; always the same, whatever else is mixed in. Compares no texts
(overlap.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

from dynrun.artifacts import sha256_bytes
from dynrun.calibration.conversation import Conversation
from dynrun.calibration.dataset import BUILTIN_NAME, Source

Split = Literal["calibration", "probe", "test"]
SPLITS: tuple[Split, ...] = ("calibration", "probe", "test")
# Of ten documents of a kind: five to calibrate on, two to probe, three to test.
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
# Of a hundred documents of a user's source; of fewer than ten documents none.
_PROBE_PERCENT, _PROBE_LEAST = 10, 10


def split_of_source(source: Source, which: Split) -> list[Conversation]:
    """The conversations of ``source`` in one split, without near-duplicates of held-out ones.

    The shipped set is split by :func:`split`. Every other has no test part: the test is the shipped set's, so that
    numbers compare across calibrations and the proof is on text from another source than the user's. By the hash of
    its document, a conversation is in the probe part (10%) or in the calibration part; a source of fewer than ten
    documents is all for calibration.
    """
    if source.name == BUILTIN_NAME:
        chosen = split(source.conversations, which)
    elif which == "test":
        return []
    else:
        splits = len({_document(c) for c in source.conversations}) >= _PROBE_LEAST
        chosen = [c for c in source.conversations if (splits and _is_probe(c)) == (which == "probe")]
    return [c for c in chosen if c.id not in source.near_duplicates]


def split(conversations: Iterable[Conversation], which: Split) -> list[Conversation]:
    """One split of the shipped set, stratified by kind: every kind is in each.

    Kinds are taken in turn, so that any beginning of the list covers them all. Conversations of one document stay
    together.
    """
    by_kind: dict[str, list[list[Conversation]]] = defaultdict(list)
    for document in _documents(conversations):
        by_kind[document[0].kind].append(document)
    chosen = []
    for offset, kind in enumerate(sorted(by_kind)):
        # Each kind begins elsewhere in the pattern: small kinds must not all favour the same split.
        ordered = sorted(by_kind[kind], key=lambda document: sha256_bytes(_document(document[0]).encode()))
        parts = [d for i, d in enumerate(ordered) if _PATTERN[(i + offset * 3) % len(_PATTERN)] == which]
        chosen.append([conversation for document in parts for conversation in document])
    turns = max((len(members) for members in chosen), default=0)
    return [members[turn] for turn in range(turns) for members in chosen if turn < len(members)]


def _documents(conversations: Iterable[Conversation]) -> list[list[Conversation]]:
    found: dict[str, list[Conversation]] = defaultdict(list)
    for conversation in conversations:
        found[_document(conversation)].append(conversation)
    # By id: the split must not depend on the order they came in.
    return [sorted(members, key=lambda c: c.id) for members in found.values()]


def _document(conversation: Conversation) -> str:
    return conversation.document or conversation.id


def _is_probe(conversation: Conversation) -> bool:
    return int(sha256_bytes(_document(conversation).encode())[:8], 16) % 100 < _PROBE_PERCENT
