"""Token sequences: each conversation one of its own, rendered by the model's template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynrun.artifacts import key_of
from dynrun.calibration.conversation import Conversation
from dynrun.calibration.dataset import Dataset, Split, split
from dynrun.calibration.template import ChatTemplate
from dynrun.llamacpp.engine import Engine


@dataclass(frozen=True)
class TokenSequence:
    """One conversation's tokens, cut at the context's end."""

    id: str
    kind: str
    tokens: tuple[int, ...]


def template_of(engine: Engine) -> ChatTemplate:
    """The template that the GGUF carries; plain text where it carries none."""
    metadata = engine.header.metadata
    source = metadata.get("tokenizer.chat_template")
    bos, eos = (engine.token_text(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    return ChatTemplate(source if isinstance(source, str) else None, bos=bos, eos=eos)


def sequences(
    engine: Engine, dataset: Dataset, which: Split, *, max_tokens: int, n_ctx: int, shortest: int = 16
) -> list[TokenSequence]:
    """Sequences of split ``which`` of up to ``n_ctx`` tokens each, ``max_tokens`` in all (the last one is cut).

    Kinds are taken in turn. A conversation longer than ``n_ctx`` gives one sequence, its beginning: the middle of a
    conversation without its beginning is nothing that the model meets in use.
    """
    template = template_of(engine)
    found: list[TokenSequence] = []
    left = max_tokens
    for conversation in split(dataset.conversations, which):
        tokens = tokenize(engine, template, conversation)[: min(n_ctx, left)]
        if len(tokens) < shortest:
            continue
        found.append(TokenSequence(conversation.id, conversation.kind, tuple(tokens)))
        left -= len(tokens)
        if left < shortest:
            break
    return found


def tokenize(engine: Engine, template: ChatTemplate, conversation: Conversation) -> list[int]:
    """Tokens with special ones parsed; one BOS at most, where the vocabulary wants it."""
    tokens = engine.tokenize(template.render(conversation), parse_special=True)
    if engine.adds_bos and tokens[:1] != [engine.bos]:
        tokens.insert(0, engine.bos)
    return tokens


def fingerprint(parts: Sequence[TokenSequence]) -> str:
    """Content address of token sequences: what every measured stage depends on."""
    return key_of({"sequences": [[part.id, list(part.tokens)] for part in parts]})
