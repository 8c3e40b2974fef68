"""Conversations on disk: a file each, a line of JSON for each message, so that a kill loses nothing that was said.

Takes messages, gives them back; only the user may read the files. Asks no model anything. What is taken back (to ask
again) stays in the file, followed by a line that says so.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dynrun.artifacts import append_line, read_lines, translated_os_errors
from dynrun.errors import NotFoundError, UsageError
from dynrun.paths import chats_dir
from dynrun.runtime.images import image_part

ROLES = ("user", "assistant")
_TITLE = 60


@dataclass(frozen=True)
class Message:
    """``images`` are paths; ``stop`` says how an answer ended where it is not by itself."""

    role: str
    text: str
    reasoning: str = ""
    images: tuple[str, ...] = ()
    stop: str = "end"


@dataclass(frozen=True)
class Chat:
    """A conversation with ``model`` (as the user named it); ``path`` is its file, written with the first message."""

    id: str
    model: str
    path: Path
    system: str = ""
    messages: tuple[Message, ...] = ()
    updated_s: float = field(default=0.0, compare=False)

    @property
    def title(self) -> str:
        """The beginning of the first question."""
        words = " ".join(self.messages[0].text.split()) if self.messages else ""
        return words if len(words) <= _TITLE else f"{words[: _TITLE - 1]}…"

    def said(self, *messages: Message) -> Chat:
        """With more messages, on disk before this returns."""
        with translated_os_errors(self.path):
            if not self.path.exists():
                _create(self.path)
                append_line(self.path, {"model": self.model, "system": self.system})
            for message in messages:
                append_line(self.path, asdict(message))
        return replace(self, messages=(*self.messages, *messages))

    def taken_back(self, n: int) -> Chat:
        """Without the last ``n`` messages."""
        with translated_os_errors(self.path):
            append_line(self.path, {"taken_back": n})
        return replace(self, messages=self.messages[: len(self.messages) - n])


def new_chat(model: str, system: str = "") -> Chat:
    """A conversation without messages; nothing is written yet."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return Chat(name, model, chats_dir() / f"{name}.jsonl", system)


def list_chats() -> list[Chat]:
    """All conversations, the latest first; files that are none are left out."""
    found = [chat for path in chats_dir().glob("*.jsonl") if (chat := _read(path)) is not None]
    return sorted(found, key=lambda chat: (chat.updated_s, chat.id), reverse=True)


def find_chat(name: str) -> Chat:
    """The conversation with this id or an unambiguous beginning of it, or the ``last``.

    Raises NotFoundError for none, UsageError for several.
    """
    chats = list_chats()
    if name == "last":
        matching = chats[:1]
    else:
        matching = [c for c in chats if c.id == name] or [c for c in chats if c.id.startswith(name)]
    if not matching:
        raise NotFoundError(f"there is no conversation {name!r}", fix="list them: dynrun run --chats")
    if len(matching) > 1:
        names = ", ".join(chat.id for chat in matching[:5])
        raise UsageError(f"several conversations begin with {name!r}: {names}", fix="give more of the id")
    return _read(matching[0].path, mend=True) or matching[0]


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def _read(path: Path, *, mend: bool = False) -> Chat | None:
    lines = read_lines(path, _parsed, mend=mend)
    if not lines or not isinstance(lines[0], dict) or "model" not in lines[0]:
        return None
    messages: list[Message] = []
    for line in lines[1:]:
        if isinstance(line, Message):
            messages.append(line)
        elif "taken_back" in line:
            del messages[max(len(messages) - line["taken_back"], 0) :]
    head = lines[0]
    return Chat(path.stem, head["model"], path, head.get("system", ""), tuple(messages), path.stat().st_mtime)


def _parsed(line: Any) -> Message | dict[str, Any]:
    if not isinstance(line, dict):
        raise TypeError(line)
    if "role" not in line:
        return {**line, **({"taken_back": int(line["taken_back"])} if "taken_back" in line else {})}
    message = Message(**{**line, "images": tuple(line.get("images", ()))})
    if message.role not in ROLES:
        raise ValueError(message.role)
    return message


def request_messages(system: str, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """What llama-server's chat endpoint is sent: the system prompt and every message, images inside.

    Raises NotFoundError for an image that is not there any more.
    """
    sent: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for message in messages:
        if message.images:
            parts = [image_part(Path(image)) for image in message.images]
            sent.append({"role": message.role, "content": [*parts, {"type": "text", "text": message.text}]})
        else:
            sent.append({"role": message.role, "content": message.text})
    return sent
