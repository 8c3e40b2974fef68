"""The text of one run: sources opened, split in three, and tokenized for one model.

Takes a reference and a mixture, gives token sequences to calibrate on, to probe on and to prove on. Loads the model's
vocabulary, never its weights (but for ``self``, whose answers llama-server gives).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dynrun.artifacts import sha256_bytes
from dynrun.calibration.conversation import Conversation
from dynrun.calibration.dataset import Source, builtin
from dynrun.calibration.generated import generate, read_transcript
from dynrun.calibration.mixture import SELF_NAME, Ingredient, draw, open_ingredient, parse_mixture
from dynrun.calibration.overlap import calibration_pool
from dynrun.calibration.sequences import SHORTEST, Tokenizer, TokenSequence, beginnings
from dynrun.calibration.splits import split_of_source
from dynrun.calibration.template import ChatTemplate, template_of
from dynrun.config import Config
from dynrun.errors import UsageError
from dynrun.llamacpp.vocabulary import Vocabulary
from dynrun.models import Reference

Progress = Callable[[float, float, str], None]
# A tenth of the answers is for probing; prompts and answers count a little otherwise when they are rendered again.
_SELF_MARGIN = 1.17


@dataclass(frozen=True)
class Pool:
    """``sequences`` to calibrate on, in order; ``tokens_of`` each source; ``notes`` are lines for people."""

    sequences: tuple[TokenSequence, ...]
    tokens_of: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def n_tokens(self) -> int:
        return sum(len(one.tokens) for one in self.sequences)


@dataclass
class Text:
    """The sources with their weights, a vocabulary and a template. ``name`` is the mixture without folders."""

    name: str
    sources: Sequence[tuple[Source, float]]
    vocabulary: Vocabulary
    template: ChatTemplate
    _tokenizers: dict[int, Tokenizer] = field(default_factory=dict)

    def calibration(self, *, n_tokens: int, n_ctx: int) -> Pool:
        """``n_tokens`` in sequences of at most ``n_ctx``; every beginning has the proportions of the weights.

        The beginnings of many conversations rather than the whole of few: the first tokens of a sequence are attention
        sinks with activations of their own, and a covariance that has seen few of them misleads. Only where beginnings
        are too few do conversations go on.
        """
        tokenizer, most = self._tokenizer(n_ctx), 1
        while True:
            drawn = draw(
                self.sources,
                "calibration",
                n_tokens=n_tokens,
                count=lambda c: sum(map(len, tokenizer.pieces(c)[:most])),  # noqa: B023
            )
            longest = max((len(tokenizer.pieces(c)) for c in drawn.conversations), default=0)
            if not drawn.shortfalls or longest <= most:
                break
            most *= 2
        sequences = _sequences(tokenizer, drawn.conversations, most, n_tokens)
        if not sequences:
            raise UsageError(f"{self.name} has nothing to calibrate on", fix="name another source, or more tokens")
        return Pool(tuple(sequences), drawn.tokens_of, (*self.notes(), *drawn.shortfalls))

    def probe(self, *, n_tokens: int, n_ctx: int) -> list[TokenSequence]:
        """Beginnings of conversations of the probe split."""
        tokenizer = self._tokenizer(n_ctx)

        def count(conversation: Conversation) -> int:
            return len(next(iter(tokenizer.pieces(conversation)), ()))

        drawn = draw(self.sources, "probe", n_tokens=n_tokens, count=count)
        return beginnings(tokenizer, drawn.conversations, max_tokens=n_tokens)

    def test(self, *, n_tokens: int, n_ctx: int) -> list[TokenSequence]:
        """Beginnings of conversations of the shipped test split, whatever was calibrated on."""
        conversations = split_of_source(builtin(), "test")
        return beginnings(self._tokenizer(n_ctx), conversations, max_tokens=n_tokens)

    def notes(self) -> list[str]:
        """What people should know of the sources."""
        found = []
        for source, _ in self.sources:
            if source.n_malformed:
                first = f", the first: {source.malformed[0]}" if source.malformed else ""
                found.append(f"{source.n_malformed} of {source.n_records} records of {source.name} skipped{first}")
            if dropped := len(source.near_duplicates):
                found.append(f"{dropped} conversations of {source.name} dropped: too much like held-out ones")
        return found

    def _tokenizer(self, n_ctx: int) -> Tokenizer:
        return self._tokenizers.setdefault(n_ctx, Tokenizer(self.vocabulary, self.template, n_ctx))


def _sequences(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], most: int, n_tokens: int
) -> list[TokenSequence]:
    """Up to ``most`` sequences of each conversation, ``n_tokens`` in all (the last one is cut)."""
    found: list[TokenSequence] = []
    left = n_tokens
    for conversation in conversations:
        for tokens in tokenizer.pieces(conversation)[:most]:
            if min(left, len(tokens)) < SHORTEST:
                break
            found.append(TokenSequence(conversation.id, conversation.kind, tokens[:left]))
            left -= len(found[-1].tokens)
    return found


@contextmanager
def open_text(
    reference: Reference,
    mixture: str,
    *,
    n_tokens: int,
    config: Config,
    chat_template: Path | None = None,
    progress: Progress = lambda *_: None,
) -> Iterator[Text]:
    """Open the sources of ``mixture``; ``self`` answers, or is found to have answered, enough for ``n_tokens``.

    Raises UsageError, NotFoundError or DynrunError, each naming the source.
    """
    ingredients = parse_mixture(mixture)
    share = {one.spec: one.weight / sum(i.weight for i in ingredients) for one in ingredients}
    opened = []
    for ingredient in ingredients:
        if ingredient.spec == SELF_NAME:
            wanted = math.ceil(n_tokens * share[SELF_NAME] * _SELF_MARGIN)
            opened.append(_own_words(reference, wanted, config, chat_template, progress))
        else:
            opened.append(open_ingredient(ingredient.spec))
    weights = [one.weight for one in ingredients]
    sources = list(zip(calibration_pool(opened), weights, strict=True))
    with Vocabulary.load(reference.path) as vocabulary, template_for(vocabulary, chat_template) as template:
        yield Text(_name(ingredients), sources, vocabulary, template)


def template_for(vocabulary: Vocabulary, override: Path | None = None) -> ChatTemplate:
    """The template that a GGUF carries, or the file's; plain text where there is none."""
    bos, eos = (vocabulary.token_text(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    return template_of(vocabulary.header, bos, eos, override)


def _own_words(
    reference: Reference, n_tokens: int, config: Config, chat_template: Path | None, progress: Progress
) -> Source:
    transcript = generate(reference, n_tokens=n_tokens, config=config, chat_template=chat_template, progress=progress)
    said = sorted(read_transcript(transcript.path), key=lambda c: sha256_bytes(c.id.encode()))
    return Source(SELF_NAME, transcript.sha256, tuple(said), n_records=len(said))


def _name(ingredients: Sequence[Ingredient]) -> str:
    """What is written into files: without weights where they are equal, and never with a folder of the user's."""
    equal = len({one.weight for one in ingredients}) == 1
    names = [one.spec if one.spec.startswith("hf:") else Path(one.spec).name for one in ingredients]
    return ",".join(name if equal else f"{name}:{one.weight:g}" for name, one in zip(names, ingredients, strict=True))
