"""Likelihoods of any continuations in any contexts, in whatever order: for the field's harness.

Takes pairs of tokens, gives sums of log-probabilities. What contexts share is found by sorting them and computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynrun.llamacpp.branches import Branch, BranchEngine, cells, common_prefix

N_BATCH = 512
_BLOCK = 64
_SEQUENCES = 64

Pair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Likelihood:
    """``log_p``: of all tokens of a continuation, in nats; ``greedy``: whether greedy decoding would have given it."""

    log_p: float
    greedy: bool


@dataclass(frozen=True)
class _Block:
    prefix: tuple[int, ...]
    contexts: tuple[tuple[int, ...], ...]
    branches: tuple[Branch, ...]


def likelihoods(
    model: Path,
    pairs: Sequence[Pair],
    *,
    n_threads: int,
    n_gpu_layers: int = -1,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Likelihood]:
    """Of the second of each of ``pairs`` after the first, both with a token at least."""
    if not pairs:
        return []
    blocks = _blocks(pairs)
    found: dict[Pair, Likelihood] = {}
    with BranchEngine.open(
        model,
        n_ctx=max(cells(len(block.prefix), block.branches, N_BATCH) for block in blocks),
        n_batch=N_BATCH,
        n_seq_max=1 + max(_SEQUENCES, *(branch.n_sequences for block in blocks for branch in block.branches)),
        n_threads=n_threads,
        n_gpu_layers=n_gpu_layers,
        fixed=True,
    ) as engine:
        for block in blocks:
            scored = engine.log_probabilities(block.prefix, block.branches)
            for context, branch, leaves in zip(block.contexts, block.branches, scored, strict=True):
                for leaf, score in zip(branch.leaves, leaves, strict=True):
                    found[context, leaf] = Likelihood(float(score.log_p.sum()), bool(score.is_top.all()))
            progress(len(found), len(pairs))
    return [found[pair] for pair in pairs]


def _blocks(pairs: Sequence[Pair]) -> list[_Block]:
    """All continuations of a context together, contexts that begin alike next to each other."""
    by_context: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for context, continuation in pairs:
        by_context.setdefault(context, {})[continuation] = None
    ordered = sorted(by_context)
    blocks = []
    for i in range(0, len(ordered), _BLOCK):
        some = tuple(ordered[i : i + _BLOCK])
        n = min(common_prefix(some), min(map(len, some)) - 1) if len(some) > 1 else 0
        # A context with more continuations than there are sequences is several branches.
        contexts, branches = [], []
        for context in some:
            leaves = list(by_context[context])
            for j in range(0, len(leaves), _SEQUENCES):
                contexts.append(context)
                branches.append(Branch(context[n:], tuple(leaves[j : j + _SEQUENCES])))
        blocks.append(_Block(some[0][:n], tuple(contexts), tuple(branches)))
    return blocks
