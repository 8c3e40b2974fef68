"""The covariance of a weight's input as the triangular factor that error feedback goes by.

Takes Σxxᵀ, gives R upper triangular with R·Rᵀ = H + λ·mean(diag H)·I. Feedback needs no inverse: with
H = (I+V)·D·(I+V)ᵀ, V strictly upper in blocks, the best values for the columns still open are W + E·V, E the error so
far (LDLQ of QuIP, arXiv 2307.13304, theorem 6, which is GPTQ, arXiv 2210.17323). One Cholesky decomposition of n³/3
products is all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

# Added to the unit diagonal, one after the other, where rounding left the matrix indefinite.
_JITTERS = (1e-6, 1e-4, 1e-2)


@dataclass(frozen=True)
class Factor:
    """``r`` float32 [n, n], upper triangular, and ``h`` = r·rᵀ, of the columns in the order ``order`` (int64 [n])."""

    r: torch.Tensor
    h: torch.Tensor
    order: npt.NDArray[np.int64]

    def between(self, done: slice, slab: slice) -> torch.Tensor:
        """V of a slab: [columns done, columns of the slab]; errors of the first shift the targets of the second."""
        import torch

        r = self.r
        # R_done,slab · R_slab,slab⁻¹.
        found: torch.Tensor = torch.linalg.solve_triangular(r[slab, slab], r[done, slab], upper=True, left=False)
        return found


def factor(
    h: npt.NDArray[np.float32],
    damping: float,
    order: npt.NDArray[np.int64],
    *,
    device: str = "cpu",
    shrink: float = 0.0,
) -> Factor:
    """The factor of ``h`` [n, n], shrunk toward its diagonal by ``shrink`` and damped by ``damping``·mean(diag h).

    Columns whose input is always zero (dead) have the damping alone: nothing flows from or to them. What is still
    indefinite in float32 is decomposed in float64, with a little more on its diagonal.
    """
    import torch

    n = len(h)
    # The decomposition runs from the last column to the first: R is the flipped lower factor of the flipped matrix.
    flipped = torch.from_numpy(np.ascontiguousarray(order[::-1]))
    a = torch.from_numpy(h).to(device)[flipped.to(device)][:, flipped.to(device)]
    diagonal = torch.diagonal(a).clone()
    mean = float(diagonal.double().mean()) or 1.0
    # In place from here on: of a wide layer each copy takes hundreds of megabytes.
    a.mul_(1 - shrink)
    torch.diagonal(a).copy_(diagonal + damping * mean)
    # Unit diagonal while it is decomposed: massive activations differ from the rest by powers of ten.
    scale = torch.rsqrt(torch.diagonal(a)) if n else diagonal
    a.mul_(scale[:, None]).mul_(scale[None, :])
    lower, info = torch.linalg.cholesky_ex(a)
    for jitter in _JITTERS:
        if int(info) == 0:
            break
        lower, info = torch.linalg.cholesky_ex(a.double() + jitter * torch.eye(n, dtype=torch.float64, device=device))
    lower = lower.float() / scale[:, None]
    a.div_(scale[:, None]).div_(scale[None, :])
    return Factor(torch.flip(lower, (0, 1)).contiguous(), torch.flip(a, (0, 1)).contiguous(), order)
