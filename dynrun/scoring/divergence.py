"""Exact divergence between two sets of logits, row by row, in torch.

With z the reference's logits, p its softmax, d = z_q − z and d' = d − Σ p·d:

    KLD(p‖q) = log Σ p·exp(d') = log1p(Σ p·(expm1(d') − d'))

which keeps its relative accuracy however small the divergence is; the plain difference of log-probabilities in float32
is lost in rounding under 1e-6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

# torch takes a second to import and is needed only where divergence is really computed, not where it is read back.
if TYPE_CHECKING:
    import torch

Logits = npt.NDArray[np.float32]
Rows = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Following = npt.NDArray[np.int64]

# 64 rows of 150 000 tokens are 40 MB: they stay in the cache levels that matter on a laptop.
_CHUNK = 64
# exp overflows float32 at 88; rows with a larger difference are computed again in float64.
_LARGE = 80.0


@dataclass(frozen=True)
class Divergence:
    """Per scored token, arrays [n]: ``kld`` in nats; whether the most probable token is the same; the log-probability
    of the token that really follows, under the reference and the model (NaN where none is given)."""

    kld: Rows
    same_top: Bools
    log_p_reference: Rows
    log_p_model: Rows


def divergence(reference: Logits, model: Logits, following: Following | None = None) -> Divergence:
    """Divergence of ``model`` from ``reference`` (both [n, n_vocab]); ``following`` [n] are the true next tokens.

    Logits that are not finite give NaN. Raises ValueError for different shapes.
    """
    if reference.shape != model.shape:
        raise ValueError(f"logits of shapes {reference.shape} and {model.shape}")
    if not len(reference):
        nothing = np.empty(0)
        return Divergence(nothing, np.empty(0, dtype=np.bool_), nothing, nothing)
    parts = [
        _rows(
            reference[i : i + _CHUNK], model[i : i + _CHUNK], None if following is None else following[i : i + _CHUNK]
        )
        for i in range(0, len(reference), _CHUNK)
    ]
    kld, same, p, q = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return Divergence(kld=kld, same_top=same, log_p_reference=p, log_p_model=q)


def _rows(reference: Logits, model: Logits, following: Following | None) -> tuple[Rows, Bools, Rows, Rows]:
    import torch

    z, y = torch.from_numpy(reference), torch.from_numpy(model)
    p = torch.softmax(z, dim=1)
    d = y - z
    d -= (p * d).sum(dim=1, keepdim=True)
    # The weighted sums are taken in float64: tens of thousands of terms of mixed size.
    excess = (p * (torch.expm1(d) - d)).sum(dim=1, dtype=torch.float64)
    kld = torch.log1p(excess).clamp(min=0)
    same = (z.argmax(dim=1) == y.argmax(dim=1)).numpy()
    large = d.amax(dim=1) > _LARGE
    if bool(large.any()):
        kld[large] = _plain(z[large], y[large])
    if following is None:
        nothing = np.full(len(kld), np.nan)
        return kld.numpy(), same, nothing, nothing
    index = torch.from_numpy(following)[:, None]
    log_p, log_q = (_log_probability(logits, index) for logits in (z, y))
    return kld.numpy(), same, log_p, log_q


def _plain(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    import torch

    log_p, log_q = (torch.log_softmax(logits.double(), dim=1) for logits in (z, y))
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def _log_probability(logits: torch.Tensor, index: torch.Tensor) -> Rows:
    """Log-probability [n] of one token a row."""
    import torch

    total = torch.logsumexp(logits, dim=1).double()
    value: Rows = (logits.gather(1, index)[:, 0].double() - total).numpy()
    return value
