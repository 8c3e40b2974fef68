"""Choose one option per tensor: least total cost within a budget of bytes, and of seconds, to a proven gap.

Takes prices, gives a choice with a lower bound on the best possible cost; knows nothing of models or types. The problem
is the multiple-choice knapsack (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, chapter 11) with one or two
capacities. Its Lagrangian relaxation (knapsack.py) often proves the gap already; else HiGHS does, through
scipy.optimize.milp.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from dynrun.allocation.knapsack import ROUNDING, Flags, Floats, Ints, Problem, Relaxation, branches, chosen, fill, relax
from dynrun.errors import DoesNotFitError, DynrunError

_TIME_LIMIT_S = 300.0
_INFEASIBLE = 2
_TRIES = 10
_WEIGHT_BITS = 10
_WIDE_GAP, _MANY, _LARGE_SHARE = 5e-3, 400, 0.1
# The scaled objective, about 1e3, is far from HiGHS's absolute tolerances: 1e-6 on the gap, 1e-7 on reduced costs.
_OBJECTIVE = 1e3


class TooSlowError(DoesNotFitError):
    """No choice within the budget of bytes takes so little time; ``least_seconds`` is the least that was found."""

    def __init__(self, max_seconds: float, least_seconds: float) -> None:
        super().__init__(
            f"no choice of tensor types within the size takes {max_seconds:.4g} s or less a token",
            fix=f"the least possible is {least_seconds:.4g} s",
        )
        self.least_seconds = least_seconds


@dataclass(frozen=True)
class Option:
    """A tensor type that a tensor may have: its bytes, its cost (predicted KLD, nats per token; not negative), and the
    seconds that it adds to the time of a token."""

    type: str
    nbytes: int
    cost: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Solution:
    """``types``: tensor → chosen type; ``bound``: no choice within the limits costs less than this."""

    types: dict[str, str]
    nbytes: int
    cost: float
    bound: float
    seconds: float = 0.0


def solve(
    options: Mapping[str, Sequence[Option]],
    budget_bytes: int,
    *,
    max_seconds: float | None = None,
    incumbent: Mapping[str, str] | None = None,
    gap: float = 1e-4,
) -> Solution:
    """The option of each tensor with the least Σ cost where Σ nbytes <= ``budget_bytes`` and Σ seconds <=
    ``max_seconds``.

    ``gap`` is relative: (cost - bound) <= gap × cost. ``incumbent`` is a known choice, as of a smaller budget: the
    result costs no more than it; one that does not fit, or has types that are not among the options, is ignored.
    Raises DoesNotFitError for a budget below the smallest possible, TooSlowError where the time is out of reach (or
    nearer to its limit than ``gap``), ValueError for a tensor without options, a cost or a time that is negative or not
    finite, DynrunError where HiGHS proves no such gap.
    """
    timed = max_seconds is not None
    frontiers = {name: _frontier(name, options[name], timed=timed) for name in sorted(options)}
    smallest = sum(frontier[0].nbytes for frontier in frontiers.values())
    if budget_bytes < smallest:
        raise DoesNotFitError(
            f"no choice of tensor types fits into {budget_bytes:,} bytes",
            fix=f"the smallest possible is {smallest:,} bytes ({smallest / 1e6:,.1f} MB)",
        )
    problem = _problem(list(frontiers.values()), budget_bytes - smallest, max_seconds)

    def solution(choice: Ints, bound: float | None) -> Solution:
        return _solution({n: frontiers[n][k] for n, k in zip(frontiers, choice.tolist(), strict=True)}, bound)

    if not frontiers or problem.fits(cheapest := problem.costs.argmin(axis=1)):
        return solution(cheapest if frontiers else np.zeros(0, dtype=np.int64), None)
    start = _known(frontiers, options, incumbent or {}, timed=timed)
    if start is None or not problem.fits(start):
        start = np.zeros(len(frontiers), dtype=np.int64)
    if max_seconds is not None and problem.too_slow(start):
        start = _fastest(frontiers, options, budget_bytes, max_seconds, gap)
    found = solution(*_best(problem, start, gap))
    _check(found, budget_bytes, max_seconds, gap)
    return found


def _check(found: Solution, budget_bytes: int, max_seconds: float | None, gap: float) -> None:
    """Whatever happened before, what leaves this module keeps its promises."""
    if found.nbytes > budget_bytes or (max_seconds is not None and found.seconds > max_seconds):
        raise DynrunError("the allocation went over its budget", fix="report this with the sensitivity table")
    if found.cost - found.bound > (gap + ROUNDING) * found.cost:
        raise DynrunError(
            f"the allocation proved only {found.bound:.6g} <= best <= {found.cost:.6g}, no gap of {gap:g}",
            fix="change the size a little, or allow a larger gap",
        )


def _frontier(name: str, options: Sequence[Option], *, timed: bool) -> list[Option]:
    """The options that no other dominates (no larger, no costlier and, if ``timed``, no slower), smallest first."""
    if not options:
        raise ValueError(f"{name} has no options")
    frontier: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.cost, o.seconds, o.type)):
        for value, means in ((option.cost, "costs"), (option.seconds, "takes")):
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} as {option.type} {means} {value}")
        if not any(_dominates(other, option, timed=timed) for other in frontier):
            frontier.append(option)
    return frontier


def _dominates(one: Option, other: Option, *, timed: bool) -> bool:
    """Whether ``one`` is as good as ``other`` in every respect."""
    return one.nbytes <= other.nbytes and one.cost <= other.cost and not (timed and one.seconds > other.seconds)


def _problem(frontiers: list[list[Option]], spare_bytes: int, max_seconds: float | None) -> Problem:
    """``spare_bytes``: the budget over the sum of the smallest options."""
    over = [[option.nbytes - frontier[0].nbytes for option in frontier] for frontier in frontiers]
    # In units of the divisor the coefficients are small integers and the capacity is rounded down to what can be used.
    unit = math.gcd(*(n for row in over for n in row)) or 1
    shape = len(frontiers), max(map(len, frontiers), default=0)
    costs, weights, seconds = np.full(shape, np.inf), np.zeros(shape, dtype=np.int64), np.zeros(shape)
    for i, frontier in enumerate(frontiers):
        costs[i, : len(frontier)] = [option.cost for option in frontier]
        weights[i, : len(frontier)] = [n // unit for n in over[i]]
        seconds[i, : len(frontier)] = [option.seconds for option in frontier]
    if max_seconds is None:
        return Problem(costs, weights, spare_bytes // unit, None, math.inf)
    return Problem(costs, weights, spare_bytes // unit, seconds, max_seconds)


def _known(
    frontiers: Mapping[str, Sequence[Option]],
    options: Mapping[str, Sequence[Option]],
    types: Mapping[str, str],
    *,
    timed: bool,
) -> Ints | None:
    """``types`` as a choice on the frontiers, a dominated one as what dominates it; None where it is no choice."""
    choice = []
    for name, frontier in frontiers.items():
        meant = next((o for o in options[name] if o.type == types.get(name)), None)
        if meant is None:
            return None
        choice.append(next(k for k, option in enumerate(frontier) if _dominates(option, meant, timed=timed)))
    return np.array(choice, dtype=np.int64)


def _fastest(
    frontiers: Mapping[str, Sequence[Option]],
    options: Mapping[str, Sequence[Option]],
    budget_bytes: int,
    max_seconds: float,
    gap: float,
) -> Ints:
    """A choice within both limits. Raises TooSlowError."""
    fastest = {name: [replace(o, cost=o.seconds) for o in frontier] for name, frontier in frontiers.items()}
    found = solve(fastest, budget_bytes, gap=gap)
    if found.cost > max_seconds:
        raise TooSlowError(max_seconds, found.cost)
    choice = _known(frontiers, options, found.types, timed=True)
    assert choice is not None
    return choice


def _best(problem: Problem, start: Ints, gap: float) -> tuple[Ints, float]:
    """A choice that costs no more than ``start``, which fits, and a lower bound."""
    best = relax(problem, start)
    best.offer(fill(problem, best.choice))
    nodes = branches(best) if _is_hard(best) else [best]
    # What was left out costs more than the best.
    bounds = [best.upper]
    for node in sorted(nodes, key=lambda node: node.lower):
        node.choice, node.upper = best.choice, best.upper
        if node.gap <= gap:
            bounds.append(node.lower)
            continue
        choice, proven = _search(node.problem, node, gap)
        bounds.append(proven)
        best.offer(fill(node.problem, choice))
    return best.choice, min(bounds)


def _is_hard(relaxation: Relaxation) -> bool:
    """Whether HiGHS would take long: much is undecided, and one tensor, far larger than the others, is why."""
    largest = relaxation.problem.weights.max(axis=1)
    one = int(largest.max()) > _LARGE_SHARE * int(largest.sum())
    return one and relaxation.gap > _WIDE_GAP and int(relaxation.keep.sum()) > _MANY


def _search(problem: Problem, relaxation: Relaxation, gap: float) -> tuple[Ints, float]:
    """A choice that fits, by HiGHS, and the lower bound that it proved."""
    covers: list[Flags] = []
    bound = relaxation.lower
    for _ in range(_TRIES):
        choice, proven = _highs(problem, relaxation, covers, gap)
        bound = max(bound, proven)
        if problem.fits(choice):
            return choice, bound
        # Tolerances let it over. No choice that is as heavy (or as slow) in every tensor fits either (a cover
        # inequality): saying so forbids nothing that does, so the bound still holds, as it would not for a smaller
        # budget.
        if problem.excess(choice) > 0 or problem.seconds is None:
            covers.append(problem.weights >= chosen(problem.weights, choice)[:, np.newaxis])
        else:
            covers.append(problem.seconds >= chosen(problem.seconds, choice)[:, np.newaxis])
    return relaxation.choice, bound


def _highs(problem: Problem, relaxation: Relaxation, covers: list[Flags], gap: float) -> tuple[Ints, float]:
    """Choice [n_tensors] and lower bound. Raises DynrunError where HiGHS ends without an optimum to ``gap``."""
    tensors, columns = np.nonzero(relaxation.keep)
    n_tensors, n = len(problem.costs), len(tensors)
    one_each = coo_array((np.ones(n), (tensors, np.arange(n))), shape=(n_tensors, n)).tocsr()
    rows, limits = _capacities(problem)
    rows += [cover.astype(np.float64) for cover in covers]
    limits += [n_tensors - 1.0] * len(covers)
    with _silent_stdout():
        result = milp(
            c=problem.costs[tensors, columns] / relaxation.upper * _OBJECTIVE,
            integrality=np.ones(n, dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(np.array([row[tensors, columns] for row in rows]), -np.inf, limits),
            ],
            options={"mip_rel_gap": gap, "time_limit": _TIME_LIMIT_S},
        )
    if result.status == _INFEASIBLE and not math.isfinite(problem.cost(relaxation.choice)):
        # The known choice is another branch's, and nothing in this one is as cheap.
        return relaxation.choice, relaxation.upper
    if result.status != 0 or result.x is None:
        raise DynrunError(f"the allocation was not solved: {result.message}", fix="change the size a little")
    shares = np.full(problem.costs.shape, -1.0)
    shares[tensors, columns] = result.x
    return shares.argmax(axis=1), float(result.mip_dual_bound) / _OBJECTIVE * relaxation.upper


def _capacities(problem: Problem) -> tuple[list[Floats], list[float]]:
    """The limits of bytes and of time as HiGHS gets them: matrices of coefficients, and what they add up to at most."""
    # A power of two keeps integers exact; HiGHS's tolerance of 1e-6 is absolute.
    scale = 2.0 ** -max(0, int(problem.weights.max()).bit_length() - _WEIGHT_BITS)
    rows: list[Floats] = [(problem.weights * scale).astype(np.float64)]
    limits = [problem.capacity * scale]
    if problem.seconds is not None and (slowest := float(problem.seconds.max())) > 0:
        scale = 2**_WEIGHT_BITS / slowest
        rows.append(problem.seconds * scale)
        limits.append(problem.max_seconds * scale)
    return rows, limits


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


def _solution(chosen: Mapping[str, Option], bound: float | None) -> Solution:
    """Adds up in Python's integers; ``bound`` None: nothing can be cheaper."""
    cost = math.fsum(option.cost for option in chosen.values())
    return Solution(
        types={name: option.type for name, option in chosen.items()},
        nbytes=sum(option.nbytes for option in chosen.values()),
        cost=cost,
        bound=cost if bound is None else min(cost, bound),
        seconds=math.fsum(option.seconds for option in chosen.values()),
    )
