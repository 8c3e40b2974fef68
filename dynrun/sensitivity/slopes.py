"""Slope α = KLD / error of a tensor, between a coarse and a fine measurement, and the price of a type."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Slope:
    """Two measured points of one tensor: (error, mean KLD in nats per token)."""

    coarse: tuple[float, float]
    fine: tuple[float, float]

    def at(self, error: float) -> float:
        """α at ``error``: log-log between the two points, clamped outside."""
        points = sorted(point for point in (self.coarse, self.fine) if point[0] > 0)
        slopes = [(e, max(kld, 0.0) / e) for e, kld in points]
        if not slopes:
            return 0.0
        (low, slope_low), (high, slope_high) = slopes[0], slopes[-1]
        if error <= low or low == high:
            return slope_low
        if error >= high:
            return slope_high
        if slope_low <= 0 or slope_high <= 0:
            return max(slope_low, slope_high)
        share = math.log(error / low) / math.log(high / low)
        return math.exp((1 - share) * math.log(slope_low) + share * math.log(slope_high))

    def price(self, error: float) -> float:
        """The KLD that an error of ``error`` is predicted to cost."""
        return self.at(error) * error
