"""What calibration text consists of: conversations, and documents that are none. Knows no model and no file format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Conversation:
    """``messages`` as chat templates take them; ``tools`` are OpenAI-style function schemas.

    A message has ``role`` and ``content``; an assistant's may have ``reasoning_content`` and ``tool_calls``.
    ``document`` names what the text comes from: conversations of one document never stand in two splits (empty: this
    conversation is its own document). ``text``: plain text instead of messages, which no template is applied to.
    ``thinking``: the template's switch ``enable_thinking``; None leaves it to the template.
    """

    id: str
    kind: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    language: str = "en"
    document: str = ""
    text: str = ""
    thinking: bool | None = None

    @property
    def words(self) -> str:
        """All that is said, without roles and markup: for counting and comparing."""
        if self.text:
            return self.text
        parts = (str(m.get(key) or "") for m in self.messages for key in ("reasoning_content", "content"))
        return "\n".join(part for part in parts if part)
