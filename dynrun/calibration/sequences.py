"""From conversations to token sequences, and from those to batches.

Takes a vocabulary and a template, gives tokens; chooses no text (mixture.py) and runs no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from dynrun.artifacts import key_of
from dynrun.calibration.conversation import Conversation
from dynrun.calibration.template import ChatTemplate
from dynrun.errors import DynrunError
from dynrun.llamacpp.vocabulary import Vocabulary

# llama-imatrix takes no batch of fewer tokens either.
SHORTEST = 16
# How much a template may add at the end of what it would continue (an end-of-text token, a newline).
_TEMPLATE_TAIL = 24

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class TokenSequence:
    """What the model reads from an empty memory: ``tokens`` of the conversation ``id``, of its ``kind``."""

    id: str
    kind: str
    tokens: Tokens


@dataclass
class Tokenizer:
    """Conversations as sequences of at most ``n_ctx`` tokens; each conversation is rendered once."""

    vocabulary: Vocabulary
    template: ChatTemplate
    n_ctx: int
    # By identity: two sources may call their conversations the same.
    _pieces: dict[int, tuple[Conversation, list[Tokens]]] = field(default_factory=dict)

    def pieces(self, conversation: Conversation) -> list[Tokens]:
        """The conversation's sequences in order, each with a start of its own; none of fewer than 16 tokens.

        Longer ones are cut between messages, and every ``n_ctx`` tokens in a message that is longer itself.
        """
        known = self._pieces.get(id(conversation))
        if known is None:
            pieces = [tuple(tokens) for tokens in self._cut(conversation) if len(tokens) >= SHORTEST]
            known = self._pieces[id(conversation)] = (conversation, pieces)
        return known[1]

    def _cut(self, conversation: Conversation) -> list[list[int]]:
        text = self.template.render(conversation)
        whole = self.tokens(text, conversation)
        if len(whole) <= self.n_ctx:
            return [whole]
        ends = message_ends(self.template, conversation, text)
        segments = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
        found: list[list[int]] = [[]]
        for segment in segments:
            tokens = self.tokens(segment, conversation)
            plain = tokens[1:] if self._starts_with_bos(tokens) and found[-1] else tokens
            if len(found[-1]) + len(plain) <= self.n_ctx:
                found[-1] += plain
                continue
            found += self._by_length(tokens)
        return found

    def _by_length(self, tokens: list[int]) -> list[list[int]]:
        """A message that is too long, every part with BOS where the vocabulary wants one."""
        bos = tokens[:1] if self._starts_with_bos(tokens) else []
        body, step = tokens[len(bos) :], self.n_ctx - len(bos)
        return [bos + body[i : i + step] for i in range(0, len(body), step)]

    def tokens(self, text: str, conversation: Conversation) -> list[int]:
        """Special tokens of a template are parsed, those of a plain text are not; BOS where it is wanted."""
        tokens = self.vocabulary.tokenize(text, parse_special=not conversation.text)
        if self.vocabulary.adds_bos and not self._starts_with_bos(tokens):
            tokens.insert(0, self.vocabulary.bos)
        return tokens

    def _starts_with_bos(self, tokens: Sequence[int]) -> bool:
        return self.vocabulary.adds_bos and list(tokens[:1]) == [self.vocabulary.bos]


def message_ends(template: ChatTemplate, conversation: Conversation, text: str) -> list[int]:
    """Positions in ``text``, the rendered conversation, where a message ends and another begins.

    Found by rendering the conversation's beginnings; a message that the template renders otherwise when others follow
    (it may drop their thoughts) has no known end.
    """
    found: list[int] = []
    for n in range(1, len(conversation.messages)):
        try:
            beginning = template.render(replace(conversation, messages=conversation.messages[:n]))
        except DynrunError:
            continue
        common = next((i for i, (a, b) in enumerate(zip(beginning, text, strict=False)) if a != b), len(beginning))
        if len(beginning) - common <= _TEMPLATE_TAIL and (found[-1] if found else 0) < common < len(text):
            found.append(common)
    return found


def beginnings(tokenizer: Tokenizer, conversations: Iterable[Conversation], *, max_tokens: int) -> list[TokenSequence]:
    """The first sequence of each conversation, ``max_tokens`` in all (the last one is cut)."""
    found: list[TokenSequence] = []
    left = max_tokens
    for conversation in conversations:
        tokens = next(iter(tokenizer.pieces(conversation)), ())[:left]
        if len(tokens) < SHORTEST:
            continue
        found.append(TokenSequence(conversation.id, conversation.kind, tokens))
        left -= len(tokens)
        if left < SHORTEST:
            break
    return found


def pack(sequences: Iterable[TokenSequence], *, n_tokens: int, n_seq_max: int) -> list[Sequence[Sequence[int]]]:
    """Batches of at most ``n_tokens`` tokens in at most ``n_seq_max`` sequences, in the order given."""
    batches: list[list[Sequence[int]]] = []
    left = 0
    for sequence in sequences:
        if not batches or len(sequence.tokens) > left or len(batches[-1]) == n_seq_max:
            batches.append([])
            left = n_tokens
        batches[-1].append(sequence.tokens)
        left -= len(sequence.tokens)
    return [*batches]


def fingerprint(sequences: Sequence[TokenSequence]) -> str:
    """Content address of token sequences: what every measured stage depends on."""
    return key_of({"sequences": [[one.id, list(one.tokens)] for one in sequences]})
