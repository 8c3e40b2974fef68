"""Have a model answer questions: the log-likelihood of every choice, each shared beginning computed once.

Takes a task and a vocabulary to prepare it, an engine to answer it; gives an :class:`Answer` a question. Stores none.

Letters: the prompt ends where a letter follows; a choice's likelihood is the sum of the probabilities of its letter's
tokens, with and without a leading space, as many as the vocabulary has. Continuations: the sum over the tokens of the
choice after its context, as lm-evaluation-harness encodes them (lm_eval/api/model.py, _encode_pair).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from dynrun.errors import DynrunError
from dynrun.evaluation.questions import Question, Score, Task
from dynrun.llamacpp.branches import Branch, BranchEngine, LogP, cells, common_prefix
from dynrun.llamacpp.vocabulary import Vocabulary

N_BATCH = 512
# Of this many at a time answers are stored; their common prefix is computed once.
_BLOCK = 128
# Sequences of a round at most, beside the one that holds the prefix.
_SEQUENCES = 64


@dataclass(frozen=True)
class Answer:
    """What a model makes of a question; lists have an entry for each choice.

    ``log_p``: log-likelihood in nats; ``chars``: the choice's length; ``tail``: mean log-probability per token after
    what all choices have in common (llama-perplexity's score). ``dropped``: shots left out for the context's sake;
    ``cut``: tokens of the beginning left out because even the question alone is too long.
    """

    id: str
    subject: str
    gold: int
    log_p: list[float]
    chars: list[int]
    tail: list[float]
    dropped: int = 0
    cut: int = 0

    def choice(self, score: Score) -> int:
        """The index of the likeliest choice: by likelihood, per character, or per token after the common part."""
        if score == "acc_norm":
            return int(np.argmax(np.array(self.log_p) / np.array(self.chars)))
        return int(np.argmax(self.tail if score == "acc_tokens" else self.log_p))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Prepared:
    """A question in tokens: several leaves for each letter, or one for each continuation.

    ``spellings``: how many leaves each letter has, empty for continuations. ``starts``, ``tails``: where in its leaf a
    continuation begins, and where it differs from the others.
    """

    question: Question
    branches: tuple[Branch, ...]
    spellings: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    tails: tuple[int, ...] = ()
    dropped: int = 0
    cut: int = 0


@dataclass(frozen=True)
class Block:
    """Questions that are answered together, and the tokens that they all begin with."""

    prefix: tuple[int, ...]
    prepared: tuple[_Prepared, ...]

    @cached_property
    def branches(self) -> list[Branch]:
        n = len(self.prefix)
        return [Branch(branch.stem[n:], branch.leaves) for one in self.prepared for branch in one.branches]

    @property
    def n_cells(self) -> int:
        return cells(len(self.prefix), self.branches, N_BATCH)

    @property
    def n_sequences(self) -> int:
        return max(branch.n_sequences for branch in self.branches)


def prepare(task: Task, vocabulary: Vocabulary, *, n_ctx: int, shared: bool = True) -> list[Block]:
    """The task's questions in tokens, in order; prompts longer than ``n_ctx`` lose shots from the front.

    Without ``shared`` every question is a block of its own (to measure what sharing saves). Raises DynrunError where
    the vocabulary has no token for a letter.
    """
    prepare_one = _Letters(vocabulary, n_ctx) if task.scoring == "letters" else _Continuations(vocabulary, n_ctx)
    prepared = [prepare_one(question) for question in task.questions]
    blocks = []
    for _, same in groupby(prepared, key=lambda one: (one.question.header, one.question.shots[one.dropped :])):
        some = list(same)
        size = _BLOCK if shared else 1
        blocks += [_block(some[i : i + size], shared) for i in range(0, len(some), size)]
    return blocks


def open_engine(blocks: Sequence[Block], path: Any, *, n_threads: int, n_gpu_layers: int = -1) -> BranchEngine:
    """An engine with room for ``blocks``."""
    return BranchEngine.open(
        path,
        n_ctx=max(block.n_cells for block in blocks),
        n_batch=N_BATCH,
        n_seq_max=1 + max(_SEQUENCES, *(block.n_sequences for block in blocks)),
        n_threads=n_threads,
        n_gpu_layers=n_gpu_layers,
        fixed=True,
    )


def answer(block: Block, engine: BranchEngine) -> list[Answer]:
    """The answers to a block's questions."""
    scored = iter(engine.log_probabilities(block.prefix, block.branches))
    return [_answer(one, [leaf.log_p for _ in one.branches for leaf in next(scored)]) for one in block.prepared]


def _block(prepared: Sequence[_Prepared], shared: bool) -> Block:
    stems = [branch.stem for one in prepared for branch in one.branches]
    # Each keeps a token of its own, after which its answer is asked for.
    n = min(common_prefix(stems), min(map(len, stems)) - 1) if shared and len(stems) > 1 else 0
    return Block(stems[0][:n], tuple(prepared))


def _answer(one: _Prepared, leaves: Sequence[LogP]) -> Answer:
    question = one.question
    if one.spellings:
        rest: Iterator[LogP] = iter(leaves)
        log_p = tail = [float(np.logaddexp.reduce([next(rest)[0] for _ in range(n)])) for n in one.spellings]
    else:
        log_p = [float(leaf[start:].sum()) for leaf, start in zip(leaves, one.starts, strict=True)]
        # A choice that another one begins with has nothing of its own.
        tail = [float(leaf[t:].mean()) if len(leaf) > t else 0.0 for leaf, t in zip(leaves, one.tails, strict=True)]
    chars = [len(choice.removeprefix(" ")) for choice in question.choices]
    return Answer(question.id, question.subject, question.gold, log_p, chars, tail, one.dropped, one.cut)


class _Letters:
    """Prepare questions that are answered with a letter."""

    def __init__(self, vocabulary: Vocabulary, n_ctx: int) -> None:
        self.vocabulary, self.n_ctx = vocabulary, n_ctx
        self._spellings = letter_tokens(vocabulary)

    def __call__(self, question: Question) -> _Prepared:
        letters = [self._tokens_of(choice) for choice in question.choices]
        for dropped in range(len(question.shots) + 1):
            tokens = encode(self.vocabulary, question.prompt(0, dropped))
            if len(tokens) <= self.n_ctx:
                break
        cut = max(0, len(tokens) - self.n_ctx)
        stem = _cut(tokens, cut, self.vocabulary)
        leaves = tuple((token,) for some in letters for token in some)
        return _Prepared(question, (Branch(stem, leaves),), tuple(map(len, letters)), dropped=dropped, cut=cut)

    def _tokens_of(self, letter: str) -> tuple[int, ...]:
        if not (found := self._spellings.get(letter)):
            raise DynrunError(
                f"{self.vocabulary.path} has no token for the answer {letter}", fix="its vocabulary cannot be asked so"
            )
        return found


class _Continuations:
    """Prepare questions whose choices are continuations of their own."""

    def __init__(self, vocabulary: Vocabulary, n_ctx: int) -> None:
        self.vocabulary, self.n_ctx = vocabulary, n_ctx

    def __call__(self, question: Question) -> _Prepared:
        for dropped in range(len(question.shots) + 1):
            pairs = [self._pair(question, i, dropped) for i in range(len(question.choices))]
            if max(len(tokens) for tokens, _ in pairs) <= self.n_ctx:
                break
        cuts = [max(0, len(tokens) - self.n_ctx) for tokens, _ in pairs]
        tokens = [_cut(one, cut, self.vocabulary) for (one, _), cut in zip(pairs, cuts, strict=True)]
        starts = [max(1, start - cut) for (_, start), cut in zip(pairs, cuts, strict=True)]
        common = common_prefix(tokens)
        tails = starts if len(question.bodies) > 1 else [common] * len(tokens)
        # Scored tokens lie in the leaves; a stem and a leaf have a token at least.
        n = min(common, *starts, *(len(one) - 1 for one in tokens))
        if n:
            branches = [Branch(tokens[0][:n], tuple(one[n:] for one in tokens))]
        else:  # contexts that have nothing in common
            n = 1
            branches = [Branch(one[:n], (one[n:],)) for one in tokens]
        return _Prepared(
            question,
            tuple(branches),
            starts=tuple(start - n for start in starts),
            tails=tuple(max(0, tail - n) for tail in tails),
            dropped=dropped,
            cut=max(cuts),
        )

    def _pair(self, question: Question, choice: int, dropped: int) -> tuple[tuple[int, ...], int]:
        """All tokens of a choice in its context, and where the choice's own begin."""
        context, continuation = question.prompt(choice, dropped), question.choices[choice]
        # Spaces belong to the word that follows them.
        bare = context.rstrip()
        whole = encode(self.vocabulary, context + continuation)
        if len(whole) < 2:
            raise DynrunError(f"question {question.id} has a choice without context", fix="correct the data")
        return whole, min(max(1, len(encode(self.vocabulary, bare))), len(whole) - 1)


def encode(vocabulary: Vocabulary, text: str) -> tuple[int, ...]:
    """Tokens of ``text`` as plain text, after BOS where the vocabulary wants one."""
    tokens = vocabulary.tokenize(text, parse_special=False)
    return (vocabulary.bos, *tokens) if vocabulary.adds_bos else tuple(tokens)


def letter_tokens(vocabulary: Vocabulary) -> dict[str, tuple[int, ...]]:
    """Every capital letter with the tokens that are it, alone or after a space."""
    found: dict[str, tuple[int, ...]] = {}
    for token in vocabulary.normal_tokens:
        piece = vocabulary.piece(token)
        letter = piece[-1:].decode("latin-1")
        if len(piece) in (1, 2) and letter.isascii() and letter.isupper() and piece[:-1] in (b"", b" "):
            found[letter] = (*found.get(letter, ()), token)
    return found


def _cut(tokens: tuple[int, ...], n: int, vocabulary: Vocabulary) -> tuple[int, ...]:
    """``tokens`` without the first ``n`` after BOS."""
    head = 1 if vocabulary.adds_bos else 0
    return tokens[:head] + tokens[head + n :]
