"""A model's chat template: conversations to text, rendered by a child process that can do no harm.

Takes the template's source, gives text. Shapes messages to what the template knows: without tool calls or thoughts of
its own it gets them as text or not at all, and where it refuses a role, the simpler form that says the same.
Tokenizes nothing.
"""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from dynrun.calibration.conversation import Conversation
from dynrun.errors import DynrunError, NotFoundError, UsageError
from dynrun.gguf.header import Header

PLAIN_TEXT = "none: plain text"
# Templates that print the date must give the same text every day, or no cached stage would ever be found again.
TODAY = datetime(2026, 1, 1, tzinfo=UTC)
_DEADLINE_S = 10.0
_KEY = "tokenizer.chat_template"
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
Message = dict[str, Any]


@dataclass(frozen=True)
class _CallForm:
    """How a template wants tool calls: arguments as JSON text or as an object, the content beside them empty or none.

    transformers gives objects and OpenAI text; some templates print whatever they get.
    """

    as_text: bool
    empty: str | None


@dataclass
class ChatTemplate:
    """A Jinja template; without one (``source`` None) plain text. A context manager: its child ends with it.

    ``origin`` says where it came from; ``tool_source`` is used for conversations with tools where a model brings a
    template of its own for them. ``deadline_s``: seconds that one rendering may take.
    """

    source: str | None
    bos: str = ""
    eos: str = ""
    origin: str = PLAIN_TEXT
    tool_source: str | None = None
    today: datetime = TODAY
    deadline_s: float = _DEADLINE_S
    _child: _Child | None = None
    _call_forms: dict[str, _CallForm | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.source is not None and self.origin == PLAIN_TEXT:
            self.origin = "given"

    def render(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation. Raises DynrunError where the template refuses even its simplest form."""
        if self.source is None or conversation.text:
            return conversation.text or "\n\n".join(map(_written_out, conversation.messages)) + "\n"
        name = "tools" if conversation.tools and self.tool_source else "default"
        failure = ""
        for messages, tools in self._forms(name, conversation):
            answer = self._ask(name, messages, tools, conversation.thinking, add_generation_prompt)
            if "text" in answer and answer["text"].strip():
                return str(answer["text"])
            # Many templates raise for a system or tool role; the simpler form says the same.
            failure = failure or answer.get("error", "it gives no text")
            if self._child is None or not self._child.alive:
                # It would take as long, or as much, for the others.
                break
        raise DynrunError(
            f"the chat template ({self.origin}) fails on conversation {conversation.id}: {failure}",
            fix="give another with --chat-template FILE",
        )

    def _forms(self, name: str, conversation: Conversation) -> Iterator[tuple[list[Message], list[Message]]]:
        """What to try, the fullest first."""
        source = self._sources()[name]
        messages = [_with_thoughts(_with_content(message), source) for message in conversation.messages]
        if not any(m.get("tool_calls") for m in messages):
            yield messages, conversation.tools
        elif (form := self._call_form(name)) is not None:
            called = [one for m in messages for one in _called(m, form)]
            yield called, conversation.tools
            # gpt-oss takes thoughts or words beside a call, not both; as llama.cpp (common/parsers/gpt-oss.cpp).
            if any(_thinks_and_calls(m) for m in called):
                yield [{**m, "content": ""} if _thinks_and_calls(m) else m for m in called], conversation.tools
        written = [{"role": m["role"], "content": _written_out(m)} for m in messages]
        yield written, conversation.tools
        yield _system_merged(written), conversation.tools
        yield _only_user_and_assistant(messages), []

    def _call_form(self, name: str) -> _CallForm | None:
        """How the template wants tool calls; None where it knows none.

        Found by rendering a call, as llama.cpp does (common/jinja/caps.cpp).
        """
        if name not in self._call_forms:
            forms = (_CallForm(as_text, empty) for empty in ("", None) for as_text in (False, True))
            self._call_forms[name] = next((form for form in forms if self._renders(name, form)), None)
        return self._call_forms[name]

    def _renders(self, name: str, form: _CallForm) -> bool:
        arguments = {"needle": "x"}
        call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
        asked: list[Message] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        described = {"name": "f", "description": "x", "parameters": {"type": "object", "properties": {}}}
        messages = [one for message in asked for one in _called(message, form)]
        answer = self._ask(name, messages, [{"type": "function", "function": described}], None, False)
        text = str(answer.get("text", ""))
        # 'needle' is Python's way to write an object, \"needle\" text that is quoted once more: neither is meant.
        return '"needle"' in text if form.as_text else "needle" in text and "'needle'" not in text

    def _ask(
        self, name: str, messages: list[Message], tools: list[Message], thinking: bool | None, prompt: bool
    ) -> dict[str, Any]:
        """One rendering, with the variables that llama-server gives (common/chat.cpp, common/jinja/caps.cpp)."""
        variables = {
            "messages": messages,
            "add_generation_prompt": prompt,
            "bos_token": self.bos,
            "eos_token": self.eos,
            "date_string": self.today.strftime("%d %b %Y"),
            "datetime": self.today.strftime("%b %d %Y"),
            "enable_thinking": thinking is not False and _has_thoughts(self._sources()[name]),
            # Thoughts of earlier turns stay.
            "preserve_thinking": True,
            "clear_thinking": False,
            "truncate_history_thinking": False,
            "drop_thinking": False,
        }
        if tools:
            variables["tools"] = tools
        return self._running().ask({"template": name, "variables": variables}, self.deadline_s)

    def _running(self) -> _Child:
        if self._child is None or not self._child.alive:
            self._child = _Child(self._sources(), self.today, self.origin, self.deadline_s)
        return self._child

    def _sources(self) -> dict[str, str]:
        sources = {"default": self.source or ""}
        return sources | ({"tools": self.tool_source} if self.tool_source else {})

    def close(self) -> None:
        """End the child, if there is one."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def template_of(header: Header, bos: str, eos: str, override: Path | None = None) -> ChatTemplate:
    """The template in a GGUF's metadata, or in the file ``override``; plain text where there is none."""
    if override is not None:
        return ChatTemplate(read_template(override), bos, eos, f"--chat-template {override}")
    source, tools = (header.metadata.get(key) for key in (_KEY, f"{_KEY}.tool_use"))
    default, for_tools = (one if isinstance(one, str) and one.strip() else None for one in (source, tools))
    if default is None:
        # As llama.cpp (common_chat_templates_init in common/chat.cpp).
        origin = f"{_KEY}.tool_use of {header.path.name}" if for_tools else PLAIN_TEXT
        return ChatTemplate(for_tools, bos, eos, origin)
    origin = f"{_KEY} of {header.path.name}" + (f", {_KEY}.tool_use with tools" if for_tools else "")
    return ChatTemplate(default, bos, eos, origin, for_tools)


def read_template(path: Path) -> str:
    """The source in a file. Raises NotFoundError or UsageError."""
    if not path.is_file():
        raise NotFoundError(f"the chat template {path} does not exist", fix="check the path")
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise UsageError(f"the chat template {path} cannot be read: {error}", fix="give a Jinja file") from error
    if not text.strip():
        raise UsageError(f"the chat template {path} is empty", fix="give a Jinja file")
    return text


class _Child:
    """A process that renders. Whatever a template does there, here it is an error in one line."""

    def __init__(self, sources: Mapping[str, str], today: datetime, origin: str, deadline_s: float) -> None:
        # Nothing of the user's environment (Windows starts no program without this); -I: no module of the folder.
        environment = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
        argv = [sys.executable, "-I", "-m", "dynrun.calibration.template_worker"]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            encoding="utf-8", env=environment,
        )  # fmt: skip
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        # Starting Python takes its time on a busy machine: that is not the template's.
        setup = {"templates": dict(sources), "today": today.isoformat(), "deadline_s": deadline_s}
        answer = self.ask(setup, deadline_s + 60)
        if "error" in answer:
            self.kill()
            raise DynrunError(
                f"the chat template ({origin}) is not valid Jinja: {answer['error']}",
                fix="give another with --chat-template FILE",
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: Mapping[str, Any], deadline_s: float) -> dict[str, Any]:
        """The child's answer; an error where it took too long or died, after which it is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=deadline_s)
        except queue.Empty:
            self.kill()
            return {"error": f"it was not done after {deadline_s:g} s"}
        except OSError:
            line = ""
        if not line:
            self.kill()
            return {"error": "it made the process that renders it end"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        # Its output has ended: the thread reads no more when the pipe is closed.
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                # What was not sent yet cannot be.
                with suppress(OSError):
                    stream.close()


def _has_thoughts(source: str) -> bool:
    """Whether a template writes thoughts: one that only looks at the switch has it off, as in llama-server."""
    return re.search(r"think|reason", source.replace("enable_thinking", ""), re.IGNORECASE) is not None


def _with_thoughts(message: Message, source: str) -> Message:
    """Thoughts as the template has them: in their own field, inside the content, or not at all."""
    thoughts = message.get("reasoning_content")
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    if not thoughts:
        return rest
    if "block['thinking']" in source:
        text = {"type": "text", "text": rest.get("content") or ""}
        return {**rest, "content": [{"type": "thinking", "thinking": thoughts, "closed": True}, text]}
    if any(name in source for name in _THOUGHTS):
        return {**rest, **{name: thoughts for name in _THOUGHTS if name in source}}
    if "think>" in source and "split('</think>')" not in source:
        return {**rest, "content": f"<think>\n{thoughts}\n</think>\n\n{rest.get('content') or ''}"}
    return rest


def _with_content(message: Message) -> Message:
    """OpenAI's null beside a tool call; templates would print None."""
    return message if message.get("content") is not None else {**message, "content": ""}


def _called(message: Message, form: _CallForm) -> list[Message]:
    """A message whose tool calls are as the template wants them."""
    if not message.get("tool_calls"):
        return [message]
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = arguments if form.as_text else _parsed(arguments)
        elif form.as_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": arguments}})
    if form.empty is not None:
        return [{**message, "tool_calls": calls}]
    said = [{key: value for key, value in message.items() if key != "tool_calls"}] if message["content"] else []
    return [*said, {"role": message["role"], "content": None, "tool_calls": calls}]


def _thinks_and_calls(message: Message) -> bool:
    return bool(message.get("tool_calls") and message.get("content") and any(message.get(k) for k in _THOUGHTS))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _written_out(message: Message) -> str:
    """The text of a message, its tool calls written out for templates that know none."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content if part.get("text"))
    parts = [content]
    parts += [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or []]
    return "\n".join(part for part in parts if part)


def _system_merged(messages: list[Message]) -> list[Message]:
    """Without a system message, its text before the next one's; as llama.cpp (system_message_not_supported)."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    merged = {**messages[1], "content": f"{messages[0]['content']}\n{messages[1]['content']}"}
    return [merged, *messages[2:]]


def _only_user_and_assistant(messages: list[Message]) -> list[Message]:
    """The same conversation with strictly alternating user and assistant turns."""
    merged: list[Message] = []
    for message in messages:
        role = "assistant" if message["role"] == "assistant" else "user"
        if merged and merged[-1]["role"] == role:
            merged[-1]["content"] += "\n\n" + _written_out(message)
        else:
            merged.append({"role": role, "content": _written_out(message)})
    return merged
