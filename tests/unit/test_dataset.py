"""The shipped calibration set, and its split."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files

import pytest

from dynrun.calibration.conversation import Conversation
from dynrun.calibration.dataset import SPLITS, builtin, split


@pytest.fixture(scope="module")
def conversations() -> tuple[Conversation, ...]:
    return builtin().conversations


def words(conversation: Conversation) -> int:
    # A word, or one character of a script without spaces, is a token at least.
    text = " ".join(str(m.get("content") or "") for m in conversation.messages)
    return len(re.findall(r"[\u3040-\u9fff]|\w+|[^\w\s]", text))


def test_there_are_enough_conversations_of_enough_kinds(conversations: tuple[Conversation, ...]) -> None:
    assert len(conversations) >= 80
    assert len({c.kind for c in conversations}) >= 8
    assert len({c.language for c in conversations}) >= 5
    assert sum(map(words, conversations)) >= 60_000
    assert sorted(map(words, conversations))[len(conversations) // 2] >= 200


def test_every_conversation_is_well_formed(conversations: tuple[Conversation, ...]) -> None:
    assert len({c.id for c in conversations}) == len(conversations)
    for c in conversations:
        assert c.messages[-1]["role"] == "assistant", c.id
        assert str(c.messages[-1]["content"]).strip(), c.id
        assert {m["role"] for m in c.messages} <= {"system", "user", "assistant", "tool"}, c.id


def test_tool_calls_name_a_tool_that_the_conversation_has(conversations: tuple[Conversation, ...]) -> None:
    called = [(c, call) for c in conversations for m in c.messages for call in m.get("tool_calls", [])]
    assert called
    for c, call in called:
        assert call["function"]["name"] in {tool["function"]["name"] for tool in c.tools}, c.id


def test_no_conversation_is_a_variant_of_another(conversations: tuple[Conversation, ...]) -> None:
    """No sentence frame of 12 words appears in two conversations."""
    seen: dict[tuple[str, ...], str] = {}
    shared = Counter[tuple[str, str]]()
    for c in conversations:
        text = " ".join(str(m.get("content") or "") for m in c.messages if m["role"] != "system").lower()
        tokens = re.findall(r"[^\W\d_]+", text)
        for frame in {tuple(tokens[i : i + 12]) for i in range(len(tokens) - 11)}:
            if seen.setdefault(frame, c.id) != c.id:
                shared[seen[frame], c.id] += 1
    assert not shared


def test_the_splits_share_nothing_and_cover_everything(conversations: tuple[Conversation, ...]) -> None:
    parts = {which: {c.id for c in split(conversations, which)} for which in SPLITS}
    assert set().union(*parts.values()) == {c.id for c in conversations}
    assert sum(map(len, parts.values())) == len(conversations)


@pytest.mark.parametrize("which", SPLITS)
def test_every_split_has_every_kind(conversations: tuple[Conversation, ...], which: str) -> None:
    kinds = {c.kind for c in conversations}
    chosen = split(conversations, which)  # type: ignore[arg-type]
    assert {c.kind for c in chosen} == kinds
    assert {c.kind for c in chosen[: len(kinds)]} == kinds


def test_the_split_does_not_depend_on_the_order(conversations: tuple[Conversation, ...]) -> None:
    there = [c.id for c in split(conversations, "test")]
    back = [c.id for c in split(tuple(reversed(conversations)), "test")]
    assert there == back


def test_the_files_are_plain_json_lines() -> None:
    folder = files("dynrun.calibration") / "data"
    for entry in folder.iterdir():
        if entry.name.endswith(".jsonl"):
            for line in entry.read_text(encoding="utf-8").splitlines():
                assert isinstance(json.loads(line), dict)
