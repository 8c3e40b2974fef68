"""Rendering conversations through a model's own chat template, in a sandbox.

The environment is the one that transformers and llama.cpp's templates are written for: trimmed blocks, loop controls,
``raise_exception``, ``strftime_now`` and ``tojson``.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dynrun.calibration.conversation import Conversation
from dynrun.errors import DynrunError

# Templates that print the date must give the same text every day, or no cached stage would ever be found again.
_TODAY = datetime(2026, 1, 1, tzinfo=UTC)


class ChatTemplate:
    """A model's Jinja template; without one, plain text."""

    def __init__(self, source: str | None, *, bos: str = "", eos: str = "") -> None:
        self.source = source
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._template = None
        if source is not None:
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
            environment.filters["tojson"] = _tojson
            environment.globals["raise_exception"] = _raise
            environment.globals["strftime_now"] = _TODAY.strftime
            try:
                self._template = environment.from_string(source)
            except TemplateError as error:
                raise DynrunError(
                    f"the model's chat template is not valid Jinja: {error}", fix="use another GGUF of it"
                ) from error

    def render(self, conversation: Conversation) -> str:
        """The text of a conversation. Raises DynrunError where the template refuses even its simplest form."""
        if self._template is None:
            return "\n\n".join(_content(message) for message in conversation.messages) + "\n"
        attempts = (conversation.messages, _only_user_and_assistant(conversation.messages))
        for messages in attempts:
            try:
                return self._render(messages, conversation.tools)
            except (TemplateError, TypeError) as error:
                # Many templates raise for a system or tool role; the simpler form says the same.
                failure = error
        raise DynrunError(f"the model's chat template fails on conversation {conversation.id}: {failure}")

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        assert self._template is not None
        assert self.source is not None
        if "tool_calls" not in self.source:
            messages = [{"role": m["role"], "content": _content(m)} for m in messages]
        return self._template.render(
            messages=messages, tools=tools or None, add_generation_prompt=False, **self._tokens
        )


def _content(message: dict[str, Any]) -> str:
    """The text of a message, its tool calls written out for templates that know none."""
    parts = [message.get("content") or ""]
    parts += [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
    return "\n".join(part for part in parts if part)


def _only_user_and_assistant(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation with strictly alternating user and assistant turns."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        role = "assistant" if message["role"] == "assistant" else "user"
        if merged and merged[-1]["role"] == role:
            merged[-1]["content"] += "\n\n" + _content(message)
        else:
            merged.append({"role": role, "content": _content(message)})
    return merged


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **_: Any) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which no model was trained on.
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _raise(message: str) -> None:
    raise TemplateError(message)
