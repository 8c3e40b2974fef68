"""Log-probabilities of continuations, with what they share computed once.

A model evaluated on questions reads the same beginnings again and again: the examples before all questions of a
subject, the question before each of its answers. :class:`BranchEngine` decodes such a beginning into one sequence of
the KV cache, gives it to the others as a copy (cells of a unified cache are only marked, not moved), and decodes what
differs, many sequences at a time. It takes tokens and gives log-probabilities; it knows no questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import numpy.typing as npt

from dynrun.errors import DynrunError
from dynrun.llamacpp.engine import Engine, Tokens
from dynrun.llamacpp.not_finite import not_finite

LogP = npt.NDArray[np.float64]

# Sequence 0 holds the shared prefix and nothing else.
_FIRST = 1


@dataclass(frozen=True)
class Branch:
    """``stem`` (one token at least) follows the prefix, each of ``leaves`` (one token at least) follows the stem."""

    stem: tuple[int, ...]
    leaves: tuple[tuple[int, ...], ...]

    @property
    def n_tokens(self) -> int:
        """Tokens to decode: nobody asks what follows a leaf's last token."""
        return len(self.stem) + sum(len(leaf) - 1 for leaf in self.leaves)

    @property
    def n_sequences(self) -> int:
        """Sequences that a round needs for it."""
        return max(1, sum(len(leaf) > 1 for leaf in self.leaves))

    def split(self) -> list[Branch]:
        """The same in branches of one sequence: for a memory in which sequences cannot share tokens."""
        return [self] if self.n_sequences == 1 else [Branch(self.stem, (leaf,)) for leaf in self.leaves]


@dataclass(frozen=True)
class LeafScore:
    """For each token of a leaf its natural log-probability, and whether no other token was likelier there."""

    log_p: LogP
    is_top: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Entry:
    """A token of a batch; ``row``: what its logits are wanted for, (branch, leaf, index in the leaf, token) each."""

    token: int
    position: int
    sequences: tuple[int, ...]
    wanted: tuple[tuple[int, int, int, int], ...] = ()


def common_prefix(sequences: Sequence[Sequence[Any]]) -> int:
    """How many elements all ``sequences`` begin with alike."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False)))


def rounds(branches: Sequence[Branch], *, n_tokens: int, n_sequences: int) -> list[list[Branch]]:
    """``branches`` in order, in rounds of at most so many tokens (one branch may have more) and sequences."""
    found: list[list[Branch]] = []
    tokens = sequences = 0
    for branch in branches:
        tokens, sequences = tokens + branch.n_tokens, sequences + branch.n_sequences
        if not found or tokens > n_tokens or sequences > n_sequences:
            found.append([])
            tokens, sequences = branch.n_tokens, branch.n_sequences
        found[-1].append(branch)
    return found


def cells(n_prefix: int, branches: Sequence[Branch], n_batch: int) -> int:
    """Cells of the cache that suffice for :meth:`BranchEngine.log_probabilities`."""
    return n_prefix + max(n_batch, *(branch.n_tokens for branch in branches))


class BranchEngine(Engine):
    """An engine whose cache holds a prefix for many sequences."""

    def log_probabilities(self, prefix: Tokens, branches: Sequence[Branch]) -> list[list[LeafScore]]:
        """For each branch and leaf the log-probabilities of the leaf's tokens.

        Raises ValueError where a branch does not fit into the cache beside the prefix, DynrunError for logits that are
        not finite.
        """
        units = list(branches) if self._sequences_share else [one for branch in branches for one in branch.split()]
        self._hold(prefix)
        scored: list[LeafScore] = []
        for some in rounds(units, n_tokens=self.n_batch, n_sequences=self.n_seq_max - _FIRST):
            scored += self._round(prefix, some)
        # Split or not, leaves come in the same order.
        leaves = iter(scored)
        return [[next(leaves) for _ in branch.leaves] for branch in branches]

    @property
    def _sequences_share(self) -> bool:
        """Whether a token can be of several sequences: a cell of attention can, a recurrent state cannot."""
        lib = self._llama
        return not (lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model))

    def _hold(self, prefix: Tokens) -> None:
        self._llama.llama_memory_clear(self._memory, True)
        entries = [_Entry(token, i, (0,)) for i, token in enumerate(prefix)]
        for _ in self._decoded(entries):
            pass

    @property
    def _memory(self) -> Any:
        return self._llama.llama_get_memory(self._context)

    def _round(self, prefix: Tokens, branches: Sequence[Branch]) -> list[LeafScore]:
        """Log-probabilities of all leaves of ``branches``, one branch after another."""
        n_prefix = len(prefix)
        entries, n_sequences = _entries(n_prefix, branches)
        if n_prefix + len(entries) > self.n_ctx:
            raise ValueError(f"{n_prefix} + {len(entries)} tokens; this engine has {self.n_ctx} cells")
        for sequence in range(_FIRST, _FIRST + n_sequences) if n_prefix else ():
            self._llama.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
        found = [
            [LeafScore(np.empty(len(leaf)), np.empty(len(leaf), dtype=np.bool_)) for leaf in branch.leaves]
            for branch in branches
        ]
        for entry, row in self._decoded(entries):
            top = row.max()
            total = float(top) + float(np.log(np.exp(row - top).sum(dtype=np.float64)))
            if not np.isfinite(total):
                tokens = [*prefix, *branches[entry.wanted[0][0]].stem]
                raise not_finite(self, self.path, tokens[-self.n_batch :], "a question")
            for branch, leaf, index, token in entry.wanted:
                found[branch][leaf].log_p[index] = float(row[token]) - total
                found[branch][leaf].is_top[index] = row[token] >= top
        for sequence in range(_FIRST, _FIRST + n_sequences):
            self._llama.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return [leaf for branch in found for leaf in branch]

    def _decoded(self, entries: Sequence[_Entry]) -> Iterator[tuple[_Entry, npt.NDArray[np.float32]]]:
        """The entries whose logits are wanted, each with its row of logits (valid until the next)."""
        lib = self._llama
        for start in range(0, len(entries), self.n_batch):
            part = entries[start : start + self.n_batch]
            batch = lib.llama_batch_init(len(part), 0, self.n_seq_max)
            try:
                _fill(batch, part)
                status = lib.llama_decode(self._context, batch)
                lib.llama_synchronize(self._context)
            finally:
                lib.llama_batch_free(batch)
            if status != 0:
                raise DynrunError(f"llama_decode failed with {status} on {self.path}")
            wanted = [entry for entry in part if entry.wanted]
            if wanted:
                flat = np.ctypeslib.as_array(lib.llama_get_logits(self._context), (len(wanted) * self.n_vocab,))
                yield from zip(wanted, flat.reshape(len(wanted), self.n_vocab), strict=True)


def _entries(n_prefix: int, branches: Sequence[Branch]) -> tuple[list[_Entry], int]:
    """The tokens of a round, and how many sequences they are in."""
    entries: list[_Entry] = []
    sequence = _FIRST
    for b, branch in enumerate(branches):
        own = tuple(range(sequence, sequence + branch.n_sequences))
        sequence += branch.n_sequences
        end = len(branch.stem) - 1
        firsts = tuple((b, i, 0, leaf[0]) for i, leaf in enumerate(branch.leaves))
        entries += [_Entry(token, n_prefix + i, own, firsts if i == end else ()) for i, token in enumerate(branch.stem)]
        left = iter(own)
        for i, leaf in enumerate(branch.leaves):
            if len(leaf) > 1:
                mine = (next(left),)
                entries += [
                    _Entry(leaf[j], n_prefix + end + 1 + j, mine, ((b, i, j + 1, leaf[j + 1]),))
                    for j in range(len(leaf) - 1)
                ]
    return entries, sequence - _FIRST


def _fill(batch: Any, entries: Sequence[_Entry]) -> None:
    for i, entry in enumerate(entries):
        batch.token[i], batch.pos[i], batch.logits[i] = entry.token, entry.position, bool(entry.wanted)
        batch.n_seq_id[i] = len(entry.sequences)
        for k, sequence in enumerate(entry.sequences):
            batch.seq_id[i][k] = sequence
    batch.n_tokens = len(entries)
