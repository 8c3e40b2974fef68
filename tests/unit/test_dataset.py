"""The shipped calibration set."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from itertools import pairwise

import pytest

from dynrun.calibration.conversation import Conversation
from dynrun.calibration.dataset import builtin
from dynrun.calibration.generated import shipped_prompts


@pytest.fixture(scope="module")
def conversations() -> tuple[Conversation, ...]:
    return builtin().conversations


def words(conversation: Conversation) -> int:
    # A word, or one character of a script without spaces, is a token at least.
    text = " ".join(str(m.get("content") or "") for m in conversation.messages)
    return len(re.findall(r"[\u3040-\u9fff]|\w+|[^\w\s]", text))


def test_there_are_enough_conversations_of_enough_kinds(conversations: tuple[Conversation, ...]) -> None:
    assert len(conversations) >= 240
    assert len({c.kind for c in conversations}) >= 12
    assert len({c.language for c in conversations}) >= 8
    assert sum(map(words, conversations)) >= 120_000
    assert sorted(map(words, conversations))[len(conversations) // 2] >= 200


def test_the_kinds_of_text_that_models_meet_are_there(conversations: tuple[Conversation, ...]) -> None:
    assert sum(words(c) >= 1500 for c in conversations) >= 15
    assert sum(sum(m["role"] == "user" for m in c.messages) >= 3 for c in conversations) >= 30
    assert sum(any(m.get("tool_calls") for m in c.messages) for c in conversations) >= 20
    assert sum(any(m.get("reasoning_content") for m in c.messages) for c in conversations) >= 20
    assert {True, False} <= {c.thinking for c in conversations}
    written = Counter(name.lower() for c in conversations for name in re.findall(r"^```(\w+)", c.words, re.MULTILINE))
    assert {"python", "rust", "go", "c", "java", "sql", "bash"} <= set(written)


def test_there_are_prompts_for_the_model_to_answer() -> None:
    prompts = shipped_prompts()
    assert len(prompts) >= 600
    assert len({prompt.id for prompt in prompts}) == len({prompt.prompt for prompt in prompts}) == len(prompts)
    assert len({prompt.language for prompt in prompts}) >= 8
    assert max(len(prompt.prompt.split()) for prompt in prompts) <= 80


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


def test_the_order_is_not_that_of_the_files(conversations: tuple[Conversation, ...]) -> None:
    kinds = [c.kind for c in conversations]
    neighbours = sum(a == b for a, b in pairwise(kinds))
    assert neighbours < len(kinds) / 3
    assert builtin() == builtin()


def test_the_files_are_plain_json_lines() -> None:
    folder = files("dynrun.calibration") / "data"
    for entry in folder.iterdir():
        if entry.name.endswith(".jsonl"):
            for line in entry.read_text(encoding="utf-8").splitlines():
                assert isinstance(json.loads(line), dict)
