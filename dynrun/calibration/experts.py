"""Experts that calibration text has hardly met: how many tokens each saw, and what is done for those with few.

Takes an imatrix, gives figures or another imatrix that stock llama-quantize reads; draws no text (that is the stage's).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from dynrun.calibration.imatrix import Imatrix, unshrunk


@dataclass(frozen=True)
class Coverage:
    """The experts of ``weights`` of one block, which share a router and so their ``tokens`` (one number per expert).

    ``unseen`` of them saw nothing, ``short`` (unseen ones included) fewer tokens than the minimum asked for. Where all
    are unseen the weights have no usable entry. ``estimated``: the counts are a legacy file's, the same for every
    expert, and say nothing.
    """

    block: int | None
    weights: tuple[str, ...]
    tokens: tuple[int, ...]
    least: int
    median: float
    unseen: int
    short: int
    estimated: bool = False

    @property
    def n_expert(self) -> int:
        return len(self.tokens)

    @property
    def usable(self) -> bool:
        """Whether any expert saw anything."""
        return self.unseen < self.n_expert


def is_expert(weight: str) -> bool:
    """Whether a weight's matrices are routed experts (``ffn_*_exps``, ``ffn_*_chexps``), by its name.

    Dense weights of three dimensions exist too.
    """
    return "exps" in weight


def coverage(imatrix: Imatrix, *, min_tokens: int = 0) -> list[Coverage]:
    """The experts of each block, in the model's order: weights that saw the same numbers of tokens are one group."""
    groups: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name in sorted(imatrix.seen):
        seen = imatrix.seen[name]
        if len(seen) > 1 and is_expert(name):
            block = _block(name)
            groups.setdefault((-1 if block is None else block, tuple(int(n) for n in seen)), []).append(name)
    # Groups of one block stay in the order of their names.
    ordered = sorted(groups.items(), key=lambda item: item[0][0])
    return [_coverage(names, tokens, min_tokens, imatrix.estimated) for (_, tokens), names in ordered]


def _coverage(names: list[str], tokens: tuple[int, ...], min_tokens: int, estimated: bool) -> Coverage:
    counts = np.array(tokens)
    return Coverage(
        block=_block(names[0]),
        weights=tuple(names),
        tokens=tokens,
        least=min(tokens),
        median=float(np.median(counts)),
        unseen=int(np.count_nonzero(counts == 0)),
        short=int(np.count_nonzero(counts < max(min_tokens, 1))),
        estimated=estimated,
    )


def _block(weight: str) -> int | None:
    match = re.search(r"(?:^|\.)blk\.(\d+)\.", weight)
    return int(match[1]) if match else None


def shrink_experts(imatrix: Imatrix, n_tokens: int) -> Imatrix:
    """Give every expert ``n_tokens`` pseudo-tokens of its layer's mean, beside the tokens that it saw.

    The layer's mean is that of x² over all experts of the weight. llama-quantize, which divides sums by counts, so uses
    n/(n + ``n_tokens``) of an expert's own mean, n its tokens, and the rest of the layer's, where it would take ones
    for an expert without any. All of them need it, not only those with few tokens: another text may send to an expert
    what it never saw in this one, and where a layer has massive activations (arXiv 2402.17762) that is
    thousands of times all the rest.
    ``seen`` keeps the tokens proper; from them :func:`unshrunk` recovers the raw sums. A layer that saw nothing at all
    stays zero: it has no usable entry, and :func:`coverage` lists it. What was mixed before is not twice.
    """
    imatrix = unshrunk(imatrix)
    sums, counts = dict(imatrix.sums), dict(imatrix.counts)
    for name, seen in imatrix.counts.items():
        if len(seen) > 1 and is_expert(name) and seen.any():
            layer = imatrix.sums[name].sum(axis=0) / seen.sum()
            sums[name], counts[name] = imatrix.sums[name] + n_tokens * layer, seen + n_tokens
    return replace(imatrix, sums=sums, counts=counts, seen=imatrix.counts)
