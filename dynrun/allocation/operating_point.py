"""Prices at an operating point: what the parts of the model really cost while all of it is quantized.

Alone, a tensor's error shows what it costs alone. Among the errors of all others it may cost more or less, and single
steps away from a scheme cannot tell: their measured changes are ruled by how a tensor's new error happens to lie to the
errors of the others (docs/experiments.md). Whole schemes, each with other types in many tensors, average that out. So
the additive costs of groups of tensors (a kind, in the first or second half of the layers) are fitted to the measured
KLDs of all schemes that were tried near the best one:

    KLD_s ≈ c · Σ_g β_g · A_gs        β_g ~ N(1, τ²), relative noise σ

with A_gs the group's additive price in scheme s: a ridge regression towards the additive model. Computes only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
# How far schemes are believed to stray from the fitted model.
_SCHEMES_STRAY = 0.03
_LEAST, _MOST = 0.4, 2.5
# Schemes further than this from the best one say nothing about its surroundings.
_NEAR = 1.5


@dataclass(frozen=True)
class Observation:
    """A scheme's additive price by group, and its measured KLD (nats per token)."""

    costs: Mapping[str, float]
    kld: float


def groups_of(names: Iterable[str]) -> dict[str, str]:
    """The group of every tensor: its kind, and which half of the layers it lies in."""
    matches = {name: re.match(r"blk\.(\d+)\.(.+)", name) for name in names}
    middle = (1 + max((int(m[1]) for m in matches.values() if m), default=0)) / 2
    return {n: n if m is None else f"{m[2]} {'first' if int(m[1]) < middle else 'second'}" for n, m in matches.items()}


def refit(observations: Sequence[Observation], stray: float) -> dict[str, float]:
    """What to multiply each group's prices by, around the best of ``observations``. Empty for a single one.

    ``stray`` is τ, how far groups are believed to stray from the additive model.
    """
    best = min(observation.kld for observation in observations)
    near = [one for one in observations if one.kld <= _NEAR * best]
    if len(near) < 2 or best <= 0:
        return {}
    groups = sorted({group for one in near for group in one.costs})
    costs = np.array([[one.costs.get(group, 0.0) for group in groups] for one in near])
    klds = np.array([one.kld for one in near])
    if not costs.sum(axis=1).all():
        return {}
    scale = float(np.median(klds / costs.sum(axis=1)))
    # In units of each scheme's KLD: the noise is relative.
    shares: Floats = scale * costs / klds[:, None]
    left = shares.T @ shares / _SCHEMES_STRAY**2 + np.eye(len(groups)) / stray**2
    right = shares.T @ np.ones(len(near)) / _SCHEMES_STRAY**2 + np.ones(len(groups)) / stray**2
    factors = np.clip(np.linalg.solve(left, right), _LEAST, _MOST)
    return {group: float(factor) for group, factor in zip(groups, factors, strict=True)}
