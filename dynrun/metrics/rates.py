"""Speeds that were measured several times: their interval, their change over time, and which of two is the faster.

Takes speeds of independent rounds in tokens per second, gives plain numbers; measures nothing. Intervals are Student's:
rounds are few (the quantile is scipy.special's, as scipy.stats takes a second to import). Ratios are compared on a
logarithmic scale by Welch's test (Biometrika 34, 1947), as two benches may differ in noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

Verdict = Literal["faster", "slower", "no difference beyond noise"]


@dataclass(frozen=True)
class Rate:
    """``mean`` of the rounds, standard deviation between them, and the 95% interval of the mean: infinitely wide for
    a single round."""

    mean: float
    stddev: float
    ci95: tuple[float, float]

    @property
    def half_width(self) -> float:
        """Of the interval, as a part of the mean."""
        return (self.ci95[1] - self.ci95[0]) / 2 / self.mean if self.mean else math.inf


def rate(rounds: Sequence[float]) -> Rate:
    """Of speeds of rounds. Raises ValueError for none."""
    if not rounds:
        raise ValueError("no rounds")
    mean = float(np.mean(rounds))
    if len(rounds) < 2:
        return Rate(mean, 0.0, (-math.inf, math.inf))
    stddev = float(np.std(rounds, ddof=1))
    half = float(stdtrit(len(rounds) - 1, 0.975)) * stddev / math.sqrt(len(rounds))
    return Rate(mean, stddev, (mean - half, mean + half))


@dataclass(frozen=True)
class Change:
    """A ratio of speeds (1 for none), its 95% interval, and what it means beside the noise."""

    ratio: float
    ci95: tuple[float, float]
    verdict: Verdict


def compared(before: Sequence[float], after: Sequence[float]) -> Change:
    """Speeds of ``after`` over those of ``before``; fewer than two rounds of either prove nothing."""
    old, new = np.log(before), np.log(after)
    log_ratio = float(new.mean() - old.mean())
    if min(len(old), len(new)) < 2:
        return Change(math.exp(log_ratio), (0.0, math.inf), "no difference beyond noise")
    errors = [float(values.var(ddof=1)) / len(values) for values in (old, new)]
    variance = sum(errors)
    if variance == 0:
        return _change(log_ratio, 0.0)
    freedom = variance**2 / sum(e**2 / (n - 1) for e, n in zip(errors, (len(old), len(new)), strict=True))
    return _change(log_ratio, float(stdtrit(freedom, 0.975)) * math.sqrt(variance))


def _change(log_ratio: float, half: float) -> Change:
    low, high = math.exp(log_ratio - half), math.exp(log_ratio + half)
    verdict: Verdict = "no difference beyond noise"
    if low > 1:
        verdict = "faster"
    elif high < 1:
        verdict = "slower"
    return Change(math.exp(log_ratio), (low, high), verdict)


@dataclass(frozen=True)
class Drift:
    """By which part the speed of the same test changed from the first run to the last, with a 95% interval, fitted to
    all of them; ``proven`` where the interval excludes no change."""

    change: float
    ci95: tuple[float, float]

    @property
    def proven(self) -> bool:
        return self.ci95[0] > 0 or self.ci95[1] < 0


def drift(times_s: Sequence[float], speeds: Sequence[float]) -> Drift | None:
    """Of one test, run again and again; None for fewer than four runs."""
    if len(speeds) < 4 or len(set(times_s)) < 2:
        return None
    (slope, _), covariance = np.polyfit(times_s, np.log(speeds), 1, cov=True)
    span = max(times_s) - min(times_s)
    half = float(stdtrit(len(speeds) - 2, 0.975)) * math.sqrt(covariance[0, 0]) * span
    log_change = float(slope) * span
    low, high = math.expm1(log_change - half), math.expm1(log_change + half)
    return Drift(math.expm1(log_change), (low, high))
