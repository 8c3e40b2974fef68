"""Flips: the answers that change between two models, though their accuracy may be the same.

As "Accuracy is Not All You Need" (arXiv 2407.09141) defines them: right answers that became wrong and wrong ones that
became right, counted apart; wrong answers that became other wrong ones are `changed` but no flips. Takes answers, gives
counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

from dynrun.metrics.accuracy import wilson


@dataclass(frozen=True)
class Flips:
    """Counts over the same ``questions``: from a first model to a second."""

    right_to_wrong: int
    wrong_to_right: int
    changed: int
    questions: int

    @property
    def flips(self) -> int:
        return self.right_to_wrong + self.wrong_to_right

    @property
    def share(self) -> float:
        """Flips as a fraction of the questions."""
        return self.flips / self.questions

    @property
    def ci95(self) -> tuple[float, float]:
        """Wilson interval of :attr:`share`."""
        return wilson(self.flips, self.questions)

    @property
    def p_value(self) -> float:
        """How likely so uneven flips are if neither model is better: McNemar's exact test, two-sided."""
        low = min(self.right_to_wrong, self.wrong_to_right)
        tail = sum(comb(self.flips, k) for k in range(low + 1))
        # Integers: for thousands of flips 2**n is no float.
        return min(1.0, 2 * tail / (1 << self.flips))

    def to_json(self) -> dict[str, Any]:
        """As `dynrun eval` prints it."""
        return {
            "flips": self.share,
            "ci95": list(self.ci95),
            "right_to_wrong": self.right_to_wrong,
            "wrong_to_right": self.wrong_to_right,
            "changed": self.changed,
            "questions": self.questions,
            "p_value": self.p_value,
        }


def count_flips(gold: Sequence[int], first: Sequence[int], second: Sequence[int]) -> Flips:
    """Flips from ``first`` to ``second``, all three with a choice's index per question. Raises ValueError for none."""
    if not gold:
        raise ValueError("no questions to compare")
    rows = list(zip(gold, first, second, strict=True))
    return Flips(
        right_to_wrong=sum(a == g != b for g, a, b in rows),
        wrong_to_right=sum(b == g != a for g, a, b in rows),
        changed=sum(a != b for _, a, b in rows),
        questions=len(rows),
    )
