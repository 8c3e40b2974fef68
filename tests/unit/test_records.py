"""One record as a conversation, in the forms that data sets have."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrun.calibration.records import KNOWN_KEYS, MalformedRecordError, conversation_of

QUESTION = {"role": "user", "content": "How high is it?"}
ANSWER = {"role": "assistant", "content": "978 metres."}
CALL = {"name": "height_of", "arguments": {"summit": "Scafell Pike"}}
CALLED = {"type": "function", "function": CALL}
TOOL = {"name": "height_of", "description": "Metres", "parameters": {"type": "object", "properties": {}}}


def messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    return conversation_of(record).messages


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [QUESTION, ANSWER]},
        {"messages": json.dumps([QUESTION, ANSWER])},
        {"conversations": [QUESTION, ANSWER]},
        {"conversations": [{"from": "human", "value": "How high is it?"}, {"from": "GPT", "value": "978 metres."}]},
        {"instruction": "How high is it?", "input": "", "output": "978 metres."},
        {"instruction": "How high is it?", "response": "978 metres."},
        {"prompt": "How high is it?", "response": "978 metres."},
        {"prompt": "How high is it?", "completion": "978 metres."},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"question": "How high is it?", "answer": "978 metres."},
        {"messages": [QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "978 metres."}]}]},
        {"messages": [{"role": "system", "content": " "}, QUESTION, ANSWER, {"role": "user", "content": "Sure?"}]},
    ],
)
def test_every_form_gives_the_same_messages(record: dict[str, Any]) -> None:
    found = conversation_of(record)
    assert found.messages == [QUESTION, ANSWER]
    assert (found.text, found.tools) == ("", [])
    assert found.id == conversation_of({"messages": [QUESTION, ANSWER]}).id


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "record",
    [
        {"messages": [QUESTION, ANSWER]},
        {"conversations": [QUESTION, ANSWER]},
        {"instruction": "How high is it?", "output": "978 metres."},
        {"question": "How high is it?", "response": "978 metres."},
    ],
)
def test_a_system_prompt_beside_comes_first(record: dict[str, Any], key: str) -> None:
    assert messages({**record, key: "Be brief."}) == [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER]


def test_alpaca_has_an_input_and_a_history() -> None:
    record = {"instruction": "Sum up.", "input": "A text.", "output": "Text.", "history": [["Hello", "Hi"]]}
    assert [m["content"] for m in messages(record)] == ["Hello", "Hi", "Sum up.\nA text.", "Text."]


@pytest.mark.parametrize("key", ["text", "content"])
def test_plain_text_has_no_messages(key: str) -> None:
    found = conversation_of({key: "It rained.", "lang": "en", "document": "diary"})
    assert (found.text, found.messages, found.kind) == ("It rained.", [], "text")
    assert (found.language, found.document) == ("en", "diary")


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [{"type": "function", "function": CALL}]},
        {"tool_calls": [{"function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}]},
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([CALL])},
        {"function_call": CALL},
        {"content": [{"type": "tool_call", "value": json.dumps(CALL)}]},
    ],
)
def test_tool_calls_have_their_arguments_as_objects(calls: dict[str, Any]) -> None:
    record = {"messages": [QUESTION, {"role": "assistant", "content": None, **calls}]}
    assert messages(record)[1] == {"role": "assistant", "content": "", "tool_calls": [CALLED]}


def test_what_identifies_a_tool_call_and_its_result_is_kept() -> None:
    result = {"role": "tool", "content": "", "tool_call_id": "c1", "name": "height_of"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **CALLED}]}
    assert messages({"messages": [QUESTION, call, result, ANSWER]}) == [QUESTION, call, result, ANSWER]


def test_sharegpt_has_calls_and_observations() -> None:
    record = {
        "conversations": [
            {"from": "human", "value": "How high is it?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": '{"metres": 978}'},
            {"from": "gpt", "value": "978 metres."},
        ],
        "tools": json.dumps([TOOL]),
    }
    found = conversation_of(record)
    call = {"role": "assistant", "content": "", "tool_calls": [CALLED]}
    assert found.messages == [QUESTION, call, {"role": "tool", "content": '{"metres": 978}'}, ANSWER]
    assert found.tools == [{"type": "function", "function": TOOL}]


@pytest.mark.parametrize("tools", [[TOOL], [{"type": "function", "function": TOOL}], json.dumps([TOOL])])
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_are_function_schemas(key: str, tools: object) -> None:
    found = conversation_of({"messages": [QUESTION, ANSWER], key: tools})
    assert found.tools == [{"type": "function", "function": TOOL}]


@pytest.mark.parametrize("none", [None, "", "[]", []])
def test_no_tools_may_be_written_in_many_ways(none: object) -> None:
    assert conversation_of({"messages": [QUESTION, ANSWER], "tools": none}).tools == []


@pytest.mark.parametrize(
    "thought",
    [
        {"reasoning_content": "From memory."},
        {"reasoning": "From memory."},
        {"content": [{"type": "reasoning", "value": "From memory."}, {"type": "text", "value": "978 metres."}]},
    ],
)
def test_thoughts_are_kept_apart(thought: dict[str, Any]) -> None:
    assert messages({"messages": [QUESTION, ANSWER | thought]})[1] == {**ANSWER, "reasoning_content": "From memory."}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "null, not an object"),
        ([], "a list, not an object"),
        ({}, "empty"),
        ({"id": 1}, "neither messages nor text in it \\(it has: 'id'\\)"),
        ({"text": "  "}, "empty text"),
        ({"text": 3}, "text is a number, not text"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "[{]"}, "messages is not JSON"),
        ({"messages": {"role": "user"}}, "messages is an object, not a list"),
        ({"messages": [QUESTION]}, "no message of the assistant"),
        ({"messages": ["hello"]}, "message 1: a string, not an object"),
        ({"messages": [QUESTION, {"role": "wizard", "content": "Hi"}]}, "message 2: unknown role 'wizard'"),
        ({"messages": [{"content": "Hi"}]}, "message 1: no role"),
        ({"messages": [QUESTION, {"role": "assistant", "content": " "}]}, "message 2: no text"),
        ({"messages": [QUESTION, {"role": "assistant", "content": 5}]}, "message 2: content is a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content of type 'image_url'"),
        ({"messages": [QUESTION, {"role": "assistant", "tool_calls": [{}]}]}, "tool call without a name"),
        ({"messages": [QUESTION, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "not JSON"),
        ({"messages": [QUESTION, ANSWER], "tools": [{"description": "x"}]}, "a tool without a name"),
        ({"instruction": "Do it."}, "no answer"),
        ({"instruction": "Do it.", "output": "", "input": 3}, "input is a number"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "history is no list of pairs"),
        ({"prompt": "", "response": "b"}, "no question"),
        ({"text": "half \ud800 of it"}, "half a surrogate pair"),
        ({"\ud800": 1}, "neither messages"),
    ],
)
def test_what_is_wrong_is_said(record: object, reason: str) -> None:
    with pytest.raises(MalformedRecordError, match=reason) as caught:
        conversation_of(record)
    assert str(caught.value).encode()


def test_a_record_nested_without_end_is_malformed() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(MalformedRecordError, match="nested too deeply"):
        conversation_of(
            {"messages": [QUESTION, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": deep}]}]}
        )


_NAMES = st.sampled_from([*sorted(KNOWN_KEYS), "role", "content", "from", "value", "tool_calls", "function", "type"])
_WORDS = st.sampled_from(["user", "assistant", "system", "tool", "function_call", "text", "tool_call", "[]", "{}", ""])
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | _WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(_JSON | st.dictionaries(_NAMES, _JSON, max_size=4))
def test_whatever_the_record_only_one_error_comes_out(record: object) -> None:
    found = None
    with suppress(MalformedRecordError):
        found = conversation_of(record)
    if found is not None:
        assert found.text or found.messages[-1]["role"] == "assistant"
        assert json.dumps([found.messages, found.tools, found.text], ensure_ascii=False).encode()
