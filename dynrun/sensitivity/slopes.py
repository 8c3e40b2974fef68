"""Slope α = KLD / error of a tensor between measured points, and the price of a type.

KLD is close to linear in the weighted error of one tensor (HIGGS, arXiv 2411.17525, theorem 1); where it bends, the
points tell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

# A tensor may be measured as harmless; a price of exactly zero would let the allocation throw it away.
_FLOOR = 1e-12


@dataclass(frozen=True)
class Slope:
    """Measured ``points`` of one tensor, (error, mean KLD in nats per token), by ascending error; ``spread``: the
    relative standard error of their common level, from which sequences were in the sample."""

    points: tuple[tuple[float, float], ...]
    spread: float = 0.0

    def at(self, error: float) -> float:
        """α at ``error``: log-log between neighbouring points, clamped outside."""
        known = [(e, max(kld, 0.0) / e) for e, kld in self.points if e > 0]
        if not known:
            return 0.0
        if error <= known[0][0]:
            return known[0][1]
        for (low, slope_low), (high, slope_high) in pairwise(known):
            if error <= high:
                return _between(error, low, high, slope_low, slope_high)
        return known[-1][1]

    def price(self, error: float) -> float:
        """The KLD that an error of ``error`` is predicted to cost."""
        return self.at(error) * error

    def scaled(self, factor: float) -> Slope:
        """The same shape, ``factor`` times as steep."""
        return Slope(tuple((error, kld * factor) for error, kld in self.points), self.spread)


def _between(error: float, low: float, high: float, slope_low: float, slope_high: float) -> float:
    if slope_low <= _FLOOR or slope_high <= _FLOOR or low == high:
        return max(slope_low, slope_high)
    share = math.log(error / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(slope_low) + share * math.log(slope_high))
