"""Choose one option per tensor: least total cost within a budget of bytes, to a proven gap.

Takes prices, gives a choice with a lower bound on the best possible cost; knows nothing of models or types. The problem
is the multiple-choice knapsack (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, chapter 11); HiGHS solves it
through scipy.optimize.milp.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from dynrun.errors import DoesNotFitError, DynrunError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Number = TypeVar("Number", np.float64, np.int64)

_TIME_LIMIT_S = 300.0
_TRIES = 10
_WEIGHT_BITS = 10
_BISECTIONS = 64
# The scaled objective, about 1e3, is far from HiGHS's absolute tolerances: 1e-6 on the gap, 1e-7 on reduced costs.
_OBJECTIVE = 1e3
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Option:
    """A tensor type that a tensor may have: its bytes, and its cost (predicted KLD, nats per token; not negative)."""

    type: str
    nbytes: int
    cost: float


@dataclass(frozen=True)
class Solution:
    """``types``: tensor → chosen type; ``bound``: no choice within the budget costs less than this."""

    types: dict[str, str]
    nbytes: int
    cost: float
    bound: float


@dataclass(frozen=True)
class _Problem:
    """Frontiers as matrices [n_tensors, n_options], rows padded with infinite costs.

    ``weights`` and ``capacity`` are bytes over each tensor's smallest option, in units of their common divisor.
    """

    costs: Floats
    weights: Ints
    capacity: int

    def cost(self, choice: Ints) -> float:
        return math.fsum(_chosen(self.costs, choice).tolist())

    def excess(self, choice: Ints) -> int:
        """Units over the capacity."""
        units: list[int] = _chosen(self.weights, choice).tolist()
        return sum(units) - self.capacity


@dataclass(frozen=True)
class _Relaxation:
    """A choice that fits and its cost, a lower bound, and which options can be part of anything cheaper."""

    choice: Ints
    upper: float
    lower: float
    keep: Flags


def solve(options: Mapping[str, Sequence[Option]], budget_bytes: int, *, gap: float = 1e-4) -> Solution:
    """The option of each tensor with the least Σ cost where Σ nbytes <= ``budget_bytes``.

    ``gap`` is relative: (cost - bound) <= gap × cost. Raises DoesNotFitError for a budget below the smallest possible,
    ValueError for a tensor without options or a cost that is negative or not finite, DynrunError where HiGHS proves no
    such gap.
    """
    frontiers = {name: _frontier(name, options[name]) for name in sorted(options)}
    smallest = sum(frontier[0].nbytes for frontier in frontiers.values())
    if budget_bytes < smallest:
        raise DoesNotFitError(
            f"no choice of tensor types fits into {budget_bytes:,} bytes",
            fix=f"the smallest possible is {smallest:,} bytes ({smallest / 1e6:,.1f} MB)",
        )
    finest = {name: frontier[-1] for name, frontier in frontiers.items()}
    if sum(option.nbytes for option in finest.values()) <= budget_bytes:
        return _solution(finest, None)
    problem = _problem(list(frontiers.values()), budget_bytes - smallest)
    relaxation = _relax(problem)
    choice, bound = relaxation.choice, relaxation.lower
    # At cost 0 nothing is left to gain, and nothing to scale by.
    if relaxation.upper > 0:
        choice, bound = _search(problem, relaxation, gap)
    choice = _fill(problem, choice)
    chosen = {name: frontiers[name][k] for name, k in zip(frontiers, choice.tolist(), strict=True)}
    solution = _solution(chosen, bound)
    if solution.nbytes > budget_bytes:
        raise DynrunError("the allocation went over its budget", fix="report this with the sensitivity table")
    if solution.cost - solution.bound > (gap + _ROUNDING) * solution.cost:
        raise DynrunError(
            f"the allocation proved only {solution.bound:.6g} <= best <= {solution.cost:.6g}, no gap of {gap:g}",
            fix="change the size a little, or allow a larger gap",
        )
    return solution


def _frontier(name: str, options: Sequence[Option]) -> list[Option]:
    """The options that no other dominates (no larger and no costlier), smallest and costliest first."""
    if not options:
        raise ValueError(f"{name} has no options")
    frontier: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.cost, o.type)):
        if not math.isfinite(option.cost) or option.cost < 0:
            raise ValueError(f"{name} as {option.type} costs {option.cost}")
        if not frontier or option.cost < frontier[-1].cost:
            frontier.append(option)
    return frontier


def _problem(frontiers: list[list[Option]], spare_bytes: int) -> _Problem:
    """``spare_bytes``: the budget over the sum of the smallest options."""
    over = [[option.nbytes - frontier[0].nbytes for option in frontier] for frontier in frontiers]
    # In units of the divisor the coefficients are small integers and the capacity is rounded down to what can be used.
    unit = math.gcd(*(n for row in over for n in row)) or 1
    shape = len(frontiers), max(map(len, frontiers))
    costs, weights = np.full(shape, np.inf), np.zeros(shape, dtype=np.int64)
    for i, frontier in enumerate(frontiers):
        costs[i, : len(frontier)] = [option.cost for option in frontier]
        weights[i, : len(frontier)] = [n // unit for n in over[i]]
    return _Problem(costs, weights, spare_bytes // unit)


def _relax(problem: _Problem) -> _Relaxation:
    """Solve the Lagrangian dual by bisection of the price of a unit.

    An option is hopeless where the bound plus its reduced cost exceeds the cost of a choice that fits. Without those,
    no cost that HiGHS sees is much over the total: given 1e-9 beside 1e2 it would stop on its tolerances.
    """
    choice = np.zeros(len(problem.costs), dtype=np.int64)
    upper, lower = problem.cost(choice), -math.inf
    reduced = np.zeros_like(problem.costs)
    # With ``high`` nothing but the smallest options is worth its price; 60 decades below it everything is.
    high = 2 * float(problem.costs[np.isfinite(problem.costs)].max())
    low = high * 1e-60
    for _ in range(_BISECTIONS):
        price = math.sqrt(low) * math.sqrt(high)
        priced = problem.costs + price * problem.weights
        trial = priced.argmin(axis=1)
        bound = math.fsum([*_chosen(priced, trial).tolist(), -price * problem.capacity])
        if bound > lower:
            lower, reduced = bound, priced - priced.min(axis=1, keepdims=True)
        if problem.excess(trial) > 0:
            low = price
            continue
        high = price
        if (cost := problem.cost(trial)) < upper:
            choice, upper = trial, cost
    lower = max(0.0, lower)
    keep = np.isfinite(problem.costs) & (lower + reduced <= upper * (1 + _ROUNDING))
    keep[np.arange(len(choice)), choice] = True
    return _Relaxation(choice, upper, lower, keep)


def _search(problem: _Problem, relaxation: _Relaxation, gap: float) -> tuple[Ints, float]:
    """A choice that fits, by HiGHS, and the lower bound that it proved."""
    covers: list[Flags] = []
    bound = relaxation.lower
    for _ in range(_TRIES):
        choice, proven = _highs(problem, relaxation, covers, gap)
        bound = max(bound, proven)
        if problem.excess(choice) <= 0:
            return choice, bound
        # Tolerances let it over. No choice that is as heavy in every tensor fits either (a cover inequality): saying so
        # forbids nothing that does, so the bound still holds, as it would not for a smaller budget.
        covers.append(problem.weights >= _chosen(problem.weights, choice)[:, np.newaxis])
    return relaxation.choice, bound


def _highs(problem: _Problem, relaxation: _Relaxation, covers: list[Flags], gap: float) -> tuple[Ints, float]:
    """Choice [n_tensors] and lower bound. Raises DynrunError where HiGHS ends without an optimum to ``gap``."""
    tensors, columns = np.nonzero(relaxation.keep)
    n_tensors, n = len(problem.costs), len(tensors)
    one_each = coo_array((np.ones(n), (tensors, np.arange(n))), shape=(n_tensors, n)).tocsr()
    # A power of two keeps integers exact; HiGHS's tolerance of 1e-6 is absolute.
    scale = 2.0 ** -max(0, int(problem.weights.max()).bit_length() - _WEIGHT_BITS)
    rows = [problem.weights[tensors, columns] * scale, *(cover[tensors, columns] * 1.0 for cover in covers)]
    limits = [problem.capacity * scale] + [n_tensors - 1.0] * len(covers)
    with _silent_stdout():
        result = milp(
            c=problem.costs[tensors, columns] / relaxation.upper * _OBJECTIVE,
            integrality=np.ones(n, dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(np.array(rows), -np.inf, limits)],
            options={"mip_rel_gap": gap, "time_limit": _TIME_LIMIT_S},
        )
    if result.status != 0 or result.x is None:
        raise DynrunError(f"the allocation was not solved: {result.message}", fix="change the size a little")
    shares = np.full(problem.costs.shape, -1.0)
    shares[tensors, columns] = result.x
    return shares.argmax(axis=1), float(result.mip_dual_bound) / _OBJECTIVE * relaxation.upper


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Send what native code prints on standard output nowhere.

    HiGHS 1.12 prints a line in HighsMipSolverData::transformNewIntegerFeasibleSolution that no option of milp silences;
    it would stand among the JSON of a command.
    """
    libc = ctypes.CDLL("ucrtbase" if os.name == "nt" else None)
    libc.fflush(None)
    try:
        kept = os.dup(1)
    except OSError:
        # There is no standard output.
        yield
        return
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _fill(problem: _Problem, choice: Ints) -> Ints:
    """Spend what is left on single upgrades, the greatest gain first. Cost only falls, so every bound still holds."""
    choice = choice.copy()
    while True:
        spent = _chosen(problem.weights, choice)[:, np.newaxis]
        fits = problem.weights - spent <= -problem.excess(choice)
        gains = np.where(fits, _chosen(problem.costs, choice)[:, np.newaxis] - problem.costs, 0.0)
        tensor, option = divmod(int(gains.argmax()), gains.shape[1])
        if gains[tensor, option] <= 0:
            return choice
        choice[tensor] = option


def _chosen(values: npt.NDArray[Number], choice: Ints) -> npt.NDArray[Number]:
    """The entry of each row that ``choice`` names: [n_tensors]."""
    return values[np.arange(len(choice)), choice]


def _solution(chosen: Mapping[str, Option], bound: float | None) -> Solution:
    """Adds up in Python's integers; ``bound`` None: nothing can be cheaper."""
    cost = math.fsum(option.cost for option in chosen.values())
    return Solution(
        types={name: option.type for name, option in chosen.items()},
        nbytes=sum(option.nbytes for option in chosen.values()),
        cost=cost,
        bound=cost if bound is None else min(cost, bound),
    )
