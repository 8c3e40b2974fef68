"""Accuracy on questions: the share that was answered right, with its Wilson interval.

Takes counts, gives plain numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

# The 97.5% quantile of the standard normal distribution, as llama-perplexity has it (tools/perplexity/perplexity.cpp).
Z_95 = 1.95996398454


@dataclass(frozen=True)
class Accuracy:
    """``correct`` of ``questions``; ``value`` and ``ci95`` are fractions of 1."""

    correct: int
    questions: int

    @property
    def value(self) -> float:
        return self.correct / self.questions

    @property
    def ci95(self) -> tuple[float, float]:
        return wilson(self.correct, self.questions)

    def to_json(self) -> dict[str, Any]:
        """As `dynrun eval` prints it."""
        return {
            "accuracy": self.value,
            "ci95": list(self.ci95),
            "correct": self.correct,
            "questions": self.questions,
        }


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927, without continuity correction). Raises ValueError without a trial."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} of {n}")
    share, z2 = successes / n, Z_95 * Z_95
    middle = share + z2 / (2 * n)
    half = Z_95 * sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    scale = 1 + z2 / n
    # At either end one limit is the end itself; rounding must not put it outside.
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
