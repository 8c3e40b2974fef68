"""One record of a user's file as a conversation: OpenAI messages, ShareGPT, Alpaca, pairs, plain text.

Takes what a JSON or Parquet parser gave; whatever that is, the result is a conversation or a MalformedRecordError.
Reads no files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from dynrun.artifacts import sha256_bytes
from dynrun.calibration.conversation import Conversation


class MalformedRecordError(Exception):
    """A record is no conversation; its text is the reason, of a few words. Not meant to leave this package."""


_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
    "tool_call": "function_call",
}
# Question and answer under other names than Alpaca's.
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("question", "response"))
_ANSWERS = ("output", "response")
_TEXTS = ("text", "content")
_SYSTEMS = ("system", "system_prompt")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_OTHERS = ("messages", "conversations", "tools", "functions", "instruction", "input", "context", "history")
_ABOUT = ("kind", "category", "language", "lang", "document", "enable_thinking")

KNOWN_KEYS = frozenset([*sum(_PAIRS, ()), *_ANSWERS, *_TEXTS, *_SYSTEMS, *_REASONING, *_OTHERS, *_ABOUT])


def conversation_of(record: object) -> Conversation:
    """The conversation that ``record`` holds; its id is the hash of what is said, so that copies have the same.

    Messages after the assistant's last are left out: a question without an answer. Raises MalformedRecordError.
    """
    if not isinstance(record, dict):
        raise MalformedRecordError(f"{_kind_of(record)}, not an object")
    try:
        return _conversation(record)
    except RecursionError:
        raise MalformedRecordError("nested too deeply") from None


def passage(text: str, document: str = "") -> Conversation:
    """A piece of plain text. Raises MalformedRecordError where it is no Unicode."""
    return Conversation(_digest([[], [], text]), "text", [], language="", document=document, text=text)


def _conversation(record: dict[str, Any]) -> Conversation:
    shape = next((shape for shape in _SHAPES if all(record.get(key) is not None for key in shape[0])), None)
    if shape is None:
        known = ", ".join(_shown(key) for key in list(record)[:6])
        raise MalformedRecordError(f"neither messages nor text in it (it has: {known})" if known else "empty")
    (key, *_), read = shape
    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] = []
    text = ""
    if key in _TEXTS:
        text = _text(record[key], key)
        if not text.strip():
            raise MalformedRecordError("empty text")
    else:
        messages, tools = _complete(read(record)), _tools(record)
    thinking = record.get("thinking", record.get("enable_thinking"))
    return Conversation(
        id=_digest([messages, tools, text]),
        kind=_label(record, "kind", "category") or ("text" if text else "conversation"),
        messages=messages,
        tools=tools,
        language=_label(record, "language", "lang"),
        document=_label(record, "document"),
        text=text,
        thinking=thinking if isinstance(thinking, bool) else None,
    )


def _digest(content: Any) -> str:
    try:
        return sha256_bytes(json.dumps(content, sort_keys=True, ensure_ascii=False).encode())[:24]
    except UnicodeEncodeError:
        raise MalformedRecordError("half a surrogate pair in its text") from None
    except (TypeError, ValueError):
        raise MalformedRecordError("values that JSON does not know") from None


def _complete(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages up to the assistant's last."""
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise MalformedRecordError("no message of the assistant")
    return messages


def _from_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    return _system(record) + _messages(record["messages"], "messages")


def _from_conversations(record: dict[str, Any]) -> list[dict[str, Any]]:
    return _system(record) + _messages(record["conversations"], "conversations")


def _from_alpaca(record: dict[str, Any]) -> list[dict[str, Any]]:
    question = _text(record["instruction"], "instruction")
    if extra := _text(record.get("input") or record.get("context"), "input"):
        question = f"{question}\n{extra}"
    answer = next((record[key] for key in _ANSWERS if record.get(key) is not None), None)
    pairs = _list(record.get("history"), "history")
    messages = _system(record)
    for pair in [*pairs, [question, answer]]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise MalformedRecordError("history is no list of pairs")
        messages += _pair(*pair)
    return messages


def _from_pair(asked: str, answered: str) -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    def read(record: dict[str, Any]) -> list[dict[str, Any]]:
        question, answer = record[asked], record[answered]
        # TRL's conversational form: both are lists of messages.
        if isinstance(question, list) and isinstance(answer, list):
            return _system(record) + _messages(question, asked) + _messages(answer, answered)
        return _system(record) + _pair(question, answer)

    return read


def _pair(question: object, answer: object) -> list[dict[str, Any]]:
    said = {"user": _text(question, "question"), "assistant": _text(answer, "answer")}
    for role, text in said.items():
        if not text.strip():
            raise MalformedRecordError(f"no {'question' if role == 'user' else 'answer'}")
    return [{"role": role, "content": text} for role, text in said.items()]


# The first whose keys a record has is its shape.
_SHAPES: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any]], list[dict[str, Any]]]], ...] = (
    (("messages",), _from_messages),
    (("conversations",), _from_conversations),
    (("instruction",), _from_alpaca),
    *(((asked, answered), _from_pair(asked, answered)) for asked, answered in _PAIRS),
    *(((key,), _from_messages) for key in _TEXTS),
)


def _system(record: dict[str, Any]) -> list[dict[str, Any]]:
    for key in _SYSTEMS:
        if (text := _text(record.get(key), key)).strip():
            return [{"role": "system", "content": text}]
    return []


def _messages(value: object, key: str) -> list[dict[str, Any]]:
    found = []
    for number, message in enumerate(_list(value, key), 1):
        try:
            if read := _message(message):
                found.append(read)
        except MalformedRecordError as error:
            raise MalformedRecordError(f"message {number}: {error}") from None
    if not found:
        raise MalformedRecordError(f"{key} is empty")
    return found


def _message(message: object) -> dict[str, Any]:
    """One message; an empty one where there is nothing to say (an empty system prompt)."""
    if not isinstance(message, dict):
        raise MalformedRecordError(f"{_kind_of(message)}, not an object")
    said = message.get("role", message.get("from"))
    role = _ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise MalformedRecordError("no role" if said is None else f"unknown role {_shown(said)}")
    content = message.get("content", message.get("value"))
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(content)}
    read: dict[str, Any] = _parts(content) if isinstance(content, list) else {"content": _text(content, "content")}
    for key in _REASONING:
        if role == "assistant" and (thought := _text(message.get(key), key)):
            read["reasoning_content"] = thought
            break
    if role == "assistant" and (calls := message.get("tool_calls") or message.get("function_call")):
        read["tool_calls"] = _calls(calls)
    if role == "tool":
        read |= {key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str)}
    if not read["content"].strip() and role != "tool" and not read.keys() & {"tool_calls", "reasoning_content"}:
        if role == "system":
            return {}
        raise MalformedRecordError("no text")
    return {"role": role, **read}


def _parts(parts: list[object]) -> dict[str, Any]:
    """Content in parts: OpenAI's ``text`` parts, and LLaMA-Factory's with ``value``, thoughts and tool calls."""
    texts, thoughts, calls = [], [], []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise MalformedRecordError(f"{_kind_of(part)} in its content")
        kind = part.get("type")
        value = part.get("text", part.get("value"))
        if kind in ("text", "input_text", "output_text"):
            texts.append(_text(value, "text"))
        elif kind in ("reasoning", "thinking"):
            thoughts.append(_text(part.get("thinking", value), "reasoning"))
        elif kind in ("tool_call", "tool_calls"):
            calls += _calls(value)
        else:
            raise MalformedRecordError(f"content of type {_shown(kind)}")
    read: dict[str, Any] = {"content": "\n".join(texts)}
    if any(thoughts):
        read["reasoning_content"] = "\n".join(thoughts)
    if calls:
        read["tool_calls"] = calls
    return read


def _calls(value: object) -> list[dict[str, Any]]:
    """Tool calls with ``arguments`` as objects, as chat templates take them."""
    value = _loaded(value, "tool call")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise MalformedRecordError("no tool call")
    found = []
    for call in calls:
        if not isinstance(call, dict):
            raise MalformedRecordError(f"tool call is {_kind_of(call)}")
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise MalformedRecordError("tool call without a name")
        arguments = function.get("arguments", function.get("parameters"))
        arguments = _loaded(arguments, "arguments") if arguments not in (None, "") else {}
        if not isinstance(arguments, dict):
            raise MalformedRecordError("arguments of a tool call are no object")
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        wanted = {"name": function["name"], "arguments": arguments}
        found.append({**identity, "type": "function", "function": wanted})
    return found


def _tools(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Function schemas as OpenAI has them; bare ones are wrapped."""
    value = record.get("tools") or record.get("functions")
    if not value or value == "[]":
        return []
    found = []
    for tool in _list(value, "tools"):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise MalformedRecordError("a tool without a name")
        found.append({"type": "function", "function": function})
    return found


def _list(value: object, key: str) -> list[object]:
    """A list, or one written as JSON in a string."""
    value = _loaded(value, key) if isinstance(value, str) and value.strip() else value or []
    if not isinstance(value, list):
        raise MalformedRecordError(f"{key} is {_kind_of(value)}, not a list")
    return value


def _loaded(value: object, key: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise MalformedRecordError(f"{key} is not JSON") from None


def _text(value: object, key: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise MalformedRecordError(f"{key} is {_kind_of(value)}, not text")
    return value


def _label(record: dict[str, Any], *keys: str) -> str:
    """A short word that describes the record, if it has one."""
    for key in keys:
        value = record.get(key)
        if isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable():
            return value
    return ""


def _shown(value: object) -> str:
    return repr(value)[:40] if isinstance(value, str) else _kind_of(value)


def _kind_of(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
