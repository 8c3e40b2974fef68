"""The multiple-choice knapsack as matrices, and its Lagrangian relaxation: a lower bound, and a choice near it.

Takes options as numbers, gives bounds and choices that fit; proves no optimum (solve.py does).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Number = TypeVar("Number", np.float64, np.int64)

# Prices are found to 1e-11 of 60 decades.
_BISECTIONS = 44
_OUTER_BISECTIONS = 40
ROUNDING = 1e-9
_EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Problem:
    """Frontiers as matrices [n_tensors, n_options], rows padded with infinite costs.

    ``weights`` and ``capacity`` are bytes over each tensor's smallest option, in units of their common divisor.
    ``seconds`` is None where there is no limit of time.
    """

    costs: Floats
    weights: Ints
    capacity: int
    seconds: Floats | None
    max_seconds: float

    def cost(self, choice: Ints) -> float:
        return math.fsum(chosen(self.costs, choice).tolist())

    def excess(self, choice: Ints) -> int:
        """Units over the capacity."""
        units: list[int] = chosen(self.weights, choice).tolist()
        return sum(units) - self.capacity

    def too_slow(self, choice: Ints) -> bool:
        return self.seconds is not None and math.fsum(chosen(self.seconds, choice).tolist()) > self.max_seconds

    def fits(self, choice: Ints) -> bool:
        return self.excess(choice) <= 0 and not self.too_slow(choice)


@dataclass
class Relaxation:
    """The best so far: a choice that fits and its cost, a lower bound, and what each option adds to that bound."""

    problem: Problem
    choice: Ints
    upper: float
    lower: float
    reduced: Floats

    @property
    def keep(self) -> Flags:
        """Which options can be part of anything cheaper: their reduced cost over the bound is within ``upper``.

        Without the others no cost that HiGHS sees is much over the total: given 1e-9 beside 1e2 it would stop on its
        tolerances.
        """
        possible = np.isfinite(self.problem.costs)
        keep = possible & (self.lower + self.reduced <= self.upper * (1 + ROUNDING))
        rows = np.arange(len(self.choice))
        # The choice may be another branch's.
        keep[rows, self.choice] = possible[rows, self.choice]
        return keep

    @property
    def gap(self) -> float:
        """Relative, between the choice and the bound; 0 at cost 0, where nothing is left to gain."""
        return (self.upper - self.lower) / self.upper if self.upper > 0 else 0.0

    @property
    def hopeless(self) -> bool:
        """Whether nothing here is cheaper than ``choice``, which may be another branch's."""
        return self.lower >= self.upper

    def offer(self, choice: Ints) -> None:
        """Keep ``choice`` if it fits and is the cheapest yet."""
        if (cost := self.problem.cost(choice)) < self.upper and self.problem.fits(choice):
            self.choice, self.upper = choice, cost

    def raise_bound(self, priced: Floats, trial: Ints, paid: float) -> None:
        """Keep the bound that prices give: ``priced`` costs, the cheapest ``trial`` by them, ``paid`` for capacity."""
        terms: list[float] = chosen(priced, trial).tolist()
        # Every term was rounded a few times; far over the right price that would count as a bound.
        rounded = 4 * _EPSILON * (math.fsum(terms) + paid)
        bound = math.fsum([*terms, -paid, -rounded])
        if bound > self.lower:
            self.lower, self.reduced = bound, priced - priced.min(axis=1, keepdims=True)


def relax(problem: Problem, start: Ints, upper: float | None = None) -> Relaxation:
    """Solve the Lagrangian dual by bisection of the price of a unit, and around it of the price of a second.

    ``start`` fits; ``upper`` is its cost where it is a choice of another branch.
    """
    upper = problem.cost(start) if upper is None else upper
    found = Relaxation(problem, start, upper, -math.inf, np.zeros_like(problem.costs))
    trial = _relax_bytes(found, 0.0)
    if problem.seconds is not None and problem.too_slow(trial):
        over = problem.seconds - problem.seconds.min(
            axis=1, keepdims=True, where=np.isfinite(problem.costs), initial=np.inf
        )
        steps = over[(over > 0) & np.isfinite(problem.costs)]
        high = 2 * _greatest(problem.costs) / float(steps.min()) if steps.size else 1.0
        low = high * 1e-60
        for _ in range(_OUTER_BISECTIONS):
            if found.hopeless:
                break
            price = math.sqrt(low) * math.sqrt(high)
            # Any price gives a bound, so it does no harm that the trial's time is not that of the best byte price.
            if problem.too_slow(_relax_bytes(found, price)):
                low = price
            else:
                high = price
    found.lower = max(0.0, found.lower)
    return found


def _relax_bytes(found: Relaxation, second: float) -> Ints:
    """Bisect the price of a unit where one of time is ``second``: the last choice that fits into the bytes."""
    problem = found.problem
    costs, paid = problem.costs, 0.0
    if second and problem.seconds is not None:
        costs, paid = costs + second * problem.seconds, second * problem.max_seconds
    last = np.zeros(len(costs), dtype=np.int64)
    # With ``high`` nothing but the smallest options is worth its price; 60 decades below it everything is.
    high = 2 * _greatest(costs)
    low = high * 1e-60
    for _ in range(_BISECTIONS):
        price = math.sqrt(low) * math.sqrt(high)
        priced = costs + price * problem.weights
        trial = priced.argmin(axis=1)
        found.raise_bound(priced, trial, price * problem.capacity + paid)
        if problem.excess(trial) > 0:
            low = price
            continue
        high, last = price, trial
        found.offer(trial)
    return last


def _greatest(costs: Floats) -> float:
    return float(costs[np.isfinite(costs)].max())


def branches(found: Relaxation) -> list[Relaxation]:
    """The problem with the heaviest tensor fixed to each of its options that can still be part of anything cheaper.

    One tensor far larger than the others (an embedding) is what makes the relaxation loose: a mixture of two of its
    options is far from either. ``found`` gets the best choice of all branches and the least of their bounds.
    """
    problem = found.problem
    row = int(problem.weights.max(axis=1).argmax())
    made = []
    for k in np.argsort(found.reduced[row], kind="stable").tolist():
        if not found.keep[row, k]:
            continue
        costs = problem.costs.copy()
        costs[row] = np.inf
        costs[row, k] = problem.costs[row, k]
        branch = relax(replace(problem, costs=costs), found.choice, found.upper)
        branch.offer(fill(branch.problem, branch.choice) if branch.choice[row] == k else branch.choice)
        if branch.upper < found.upper:
            found.choice, found.upper = branch.choice, branch.upper
        made.append(branch)
    found.lower = max(found.lower, min((b.lower for b in made), default=found.upper))
    return made


def fill(problem: Problem, choice: Ints) -> Ints:
    """Spend what is left on single upgrades, the greatest gain first. Cost only falls, so every bound still holds."""
    choice = choice.copy()
    while True:
        spent = chosen(problem.weights, choice)[:, np.newaxis]
        fits = problem.weights - spent <= -problem.excess(choice)
        if problem.seconds is not None:
            taken = chosen(problem.seconds, choice)
            # A little less than is left: sums are rounded.
            left = problem.max_seconds * (1 - ROUNDING) - math.fsum(taken.tolist())
            fits &= problem.seconds - taken[:, np.newaxis] <= max(left, 0.0)
        gains = np.where(fits, chosen(problem.costs, choice)[:, np.newaxis] - problem.costs, 0.0)
        tensor, option = divmod(int(gains.argmax()), gains.shape[1])
        if gains[tensor, option] <= 0:
            return choice
        choice[tensor] = option


def chosen(values: npt.NDArray[Number], choice: Ints) -> npt.NDArray[Number]:
    """The entry of each row that ``choice`` names: [n_tensors]."""
    return values[np.arange(len(choice)), choice]
