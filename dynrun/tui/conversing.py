"""What can be done with a conversation without asking a model: branch it, search it, write it out, take code from it.

Takes and gives :class:`~dynrun.runtime.history.Chat`; all that is kept is kept by runtime/history.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dynrun.errors import UsageError
from dynrun.runtime.history import Chat, Message, new_chat

_IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".bmp")
_MOST_TEXT = 4_000_000
_FENCE = re.compile(r"^(`{3,}|~{3,})[^\n]*\n(.*?)^\1", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Attachment:
    """Something that goes with the next question: an image by its path, or a text with the name it is shown by."""

    name: str
    text: str = ""
    image: str = ""

    @property
    def label(self) -> str:
        """As the composer shows it."""
        return f"image {self.name}" if self.image else f"{self.name}, {len(self.text):,} characters"


def attachment_of(path: Path) -> Attachment:
    """A file as an attachment. Raises UsageError for one that is neither text nor an image that llama.cpp reads."""
    from dynrun.runtime.images import image_part

    if path.suffix.lower() in _IMAGES:
        # Now, not when the question has been typed.
        image_part(path)
        return Attachment(path.name, image=str(path.resolve()))
    try:
        if path.stat().st_size > _MOST_TEXT:
            raise UsageError(f"{path} has {path.stat().st_size:,} bytes", fix=f"attach at most {_MOST_TEXT:,}")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is neither text nor an image", fix="attach UTF-8 text, PNG, JPEG, GIF or BMP"
        ) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", fix="check the path") from error
    return Attachment(path.name, text)


def question(text: str, attachments: Sequence[Attachment]) -> Message:
    """The user's message: attached texts in fences before what was typed, images beside it."""
    texts = [_fenced(one) for one in attachments if not one.image]
    images = tuple(one.image for one in attachments if one.image)
    return Message("user", "\n\n".join([*texts, text] if text else texts), images=images)


def _fenced(one: Attachment) -> str:
    # A fence longer than any inside.
    longest = max((len(run) for run in re.findall(r"`{3,}", one.text)), default=2)
    fence = "`" * (longest + 1)
    return f"{one.name}:\n{fence}\n{one.text.rstrip()}\n{fence}"


def branched(chat: Chat, n_messages: int, *more: Message, model: str = "", system: str | None = None) -> Chat:
    """A new conversation with the first ``n_messages`` of ``chat``, then ``more``; ``chat`` stays as it is."""
    fresh = new_chat(model or chat.model, chat.system if system is None else system)
    kept = (*chat.messages[:n_messages], *more)
    return fresh.said(*kept) if kept else fresh


def changed(chat: Chat, *, model: str = "", system: str | None = None) -> Chat:
    """``chat`` with another model or system prompt: itself where nothing was said, a branch where something was."""
    if (model or chat.model, chat.system if system is None else system) == (chat.model, chat.system):
        return chat
    if chat.messages:
        return branched(chat, len(chat.messages), model=model, system=system)
    return replace(chat, model=model or chat.model, system=chat.system if system is None else system)


def matching(chats: Iterable[Chat], text: str) -> list[Chat]:
    """Those in which every word of ``text`` is said somewhere, letter case aside."""
    words = text.lower().split()
    return [chat for chat in chats if all(any(word in m.text.lower() for m in chat.messages) for word in words)]


def code_blocks(text: str) -> list[str]:
    """What stands in the fences of a Markdown text."""
    return [match[2] for match in _FENCE.finditer(text)]


def as_markdown(chat: Chat) -> str:
    """The whole conversation; thoughts are folded as HTML knows it."""
    parts = [f"# {chat.title or 'Conversation'}", f"Model: {chat.model}"]
    if chat.system:
        parts.append(f"> {chat.system}".replace("\n", "\n> "))
    for message in chat.messages:
        parts.append(f"## {'You' if message.role == 'user' else 'Answer'}")
        parts += [f"![]({image})" for image in message.images]
        if message.reasoning:
            parts.append(f"<details><summary>Thoughts</summary>\n\n{message.reasoning.strip()}\n\n</details>")
        parts.append(message.text.strip())
    return "\n\n".join(parts) + "\n"
