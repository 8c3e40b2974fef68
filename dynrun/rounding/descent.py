"""Codes chosen once more, column by column, now that the errors of all other columns are known.

Takes the slabs of a matrix with their codes and errors, lowers Σ eᵀHe by coordinate descent (as CDQuant, arXiv
2406.17542, does after GPTQ): feedback lets a column answer for those before it only, here it answers for all. Never
raises it, but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from dynrun.rounding.formats import Codes

# Columns whose part of H·E is one matrix product.
_LAZY = 32


def descend(slabs: Sequence[Codes], weights: torch.Tensor, errors: torch.Tensor, h: torch.Tensor) -> None:
    """One sweep over all columns. ``weights`` and ``errors`` = weights − values [n, n_rows], ``h`` [n, n], columns in
    the order of ``slabs``, which are all of one width; ``errors`` is overwritten, the slabs hold the codes."""
    width = len(weights) // len(slabs)
    for number, codes in enumerate(slabs):
        for start in range(number * width, (number + 1) * width, _LAZY):
            _block(codes, number * width, start, min(start + _LAZY, (number + 1) * width), weights, errors, h)


def _block(
    codes: Codes, origin: int, start: int, stop: int, weights: torch.Tensor, errors: torch.Tensor, h: torch.Tensor
) -> None:
    import torch

    pull = h[start:stop] @ errors
    for first in range(start, stop, codes.width):
        here, at = slice(first, first + codes.width), slice(first - start, first - start + codes.width)
        own = h[here, here]
        # Least of eᵀ·own·e + 2·eᵀ·(what the other columns pull with).
        others = pull[at] - own @ errors[here]
        shift = others / own if codes.width == 1 else torch.linalg.solve(own, others)
        error = weights[here] - codes.choose(first - origin, weights[here] + shift, own)
        pull.addmm_(h[start:stop, here], error - errors[here])
        errors[here] = error
