"""A finding, and checked access to a header's metadata for the rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dynrun.gguf.header import Header

# It will not work, or not as it should; it may not; worth knowing.
Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """``id`` names the rule and stays the same for ever; ``key`` is the metadata key, tensor or file it is about."""

    id: str
    severity: Severity
    key: str
    expected: str
    found: str


@dataclass(frozen=True)
class Subject:
    """What is looked at: a header; ``config`` is the repository's config.json, empty without; ``read_tensor`` gives a
    tensor's bytes, None where only the header is at hand."""

    header: Header
    config: Mapping[str, Any]
    read_tensor: Callable[[str], bytes] | None = None

    @property
    def architecture(self) -> str:
        return self.header.architecture

    def key(self, name: str) -> str:
        """``ARCHITECTURE.NAME``."""
        return f"{self.architecture}.{name}"

    def value(self, name: str) -> Any:
        """Of ``ARCHITECTURE.NAME``; None where there is none."""
        return self.header.metadata.get(self.key(name))

    def number(self, name: str) -> float | None:
        """A number; of a list (one a layer) its largest; None for anything else."""
        return number_of(self.value(name))

    def count(self, name: str) -> int:
        """A whole number, 0 where there is none."""
        return int(self.number(name) or 0)

    @property
    def tokens(self) -> list[str]:
        """The vocabulary; empty where the header has none."""
        found = self.header.metadata.get("tokenizer.ggml.tokens")
        return found if isinstance(found, list) else []

    def token(self, name: str) -> str:
        """The text of special token ``name`` (``bos``, ``eos``); empty where it is none of the vocabulary."""
        number = self.header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        known = isinstance(number, int) and 0 <= number < len(self.tokens)
        return str(self.tokens[number]) if known and isinstance(number, int) else ""


def number_of(value: Any) -> float | None:
    """A finite number, of a list its largest; None for anything else."""
    if isinstance(value, list):
        numbers = [found for one in value if (found := number_of(one)) is not None]
        return max(numbers, default=None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < float("inf") else None


def shown(value: Any) -> str:
    """A value for a finding: short, on one line."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)
    return text if len(text) <= 120 else f"{text[:119]}…"
