"""The allocation stage: from a sensitivity table, a budget and constraints to a scheme."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dynrun import __version__
from dynrun.allocation.constraints import NO_CONSTRAINTS, Constraints, allowed, check_patterns, nearest_type
from dynrun.allocation.solve import Option, Solution, TooSlowError, solve
from dynrun.allocation.speed import check_kinds, seconds_per_token
from dynrun.calibration.imatrix import read_imatrix
from dynrun.calibration.stage import ImatrixStage
from dynrun.errors import DoesNotFitError, UsageError
from dynrun.gguf.header import TensorInfo
from dynrun.gguf.layout import tensor_bytes
from dynrun.gguf.quantizable import candidate_types, quantizable
from dynrun.gguf.tensor_types import TENSOR_TYPES, WEIGHT_TYPES
from dynrun.llamacpp.build import installation
from dynrun.models import Reference
from dynrun.scheme import Scheme

# A preset's own types must count as fast enough for R = 1, whatever order their times are added in.
_FORGIVEN = 1e-9


class Priced(Protocol):
    """A tensor's row of the sensitivity table: the error of each type, and its price (predicted KLD)."""

    @property
    def errors(self) -> Mapping[str, float]: ...
    def price(self, type_name: str) -> float: ...


@dataclass(frozen=True)
class Budget:
    """What the file may weigh: ``size_bytes`` of the whole file, of which ``fixed_bytes`` no type changes.

    ``stock_types``: what the stock preset of that size gives each tensor, which a speed is relative to.
    """

    label: str
    size_bytes: int
    fixed_bytes: int
    stock_types: Mapping[str, str] = field(default_factory=dict)


def price_of(row: Priced, type_name: str) -> float:
    """Predicted KLD of a type, in the table or not.

    One outside it (a pinned one, a preset's) gets an estimate: the price of the type nearest in bits, times 4 for every
    bit that it has more than this one, as the error of a uniform quantizer goes (Δ²/12, Δ ∝ 2^-bits).
    """
    if type_name in row.errors:
        return row.price(type_name)
    near = nearest_type(type_name, row.errors)
    return row.price(near) * math.exp2(2 * (TENSOR_TYPES[near].bpw - TENSOR_TYPES[type_name].bpw))


def options_for(
    reference: Reference, imatrix: ImatrixStage, table: Mapping[str, Priced], constraints: Constraints
) -> dict[str, list[Option]]:
    """What each tensor can be given, with its bytes, price and time. Raises UsageError for impossible constraints."""
    tensors = quantizable(reference.header)
    check_patterns(constraints.rules, tensors)
    if constraints.speed is not None:
        check_kinds(constraints.speed, tensors)
    entries = read_imatrix(imatrix.path).sums if constraints.rules else {}
    options = {}
    for name, row in table.items():
        types = list(row.errors)
        if any(rule.matches(name) for rule in constraints.rules):
            possible = candidate_types(tensors[name], WEIGHT_TYPES, entries, reference.header.metadata)
            types = allowed(tensors[name], types, constraints, possible=possible)
        options[name] = [_option(reference, tensors[name], row, t, constraints) for t in types]
    return options


def _option(reference: Reference, tensor: TensorInfo, row: Priced, type_name: str, constraints: Constraints) -> Option:
    speed = constraints.speed
    seconds = seconds_per_token(speed, tensor, type_name, reference.header) if speed else 0.0
    return Option(type_name, tensor_bytes(tensor, type_name), price_of(row, type_name), seconds)


def choose(
    reference: Reference,
    imatrix: ImatrixStage,
    table: Mapping[str, Priced],
    budget: Budget,
    constraints: Constraints = NO_CONSTRAINTS,
    incumbent: Mapping[str, str] | None = None,
) -> Solution:
    """The types with the least predicted KLD whose whole file is at most the budget, within the constraints.

    ``incumbent``: the types of a known scheme, as of a smaller budget; where it meets all limits the result predicts no
    more than it. Raises UsageError for constraints that nothing meets, DoesNotFitError for a budget smaller than the
    smallest file, one larger than the reference, or a speed that is not reachable within the size.
    """
    if budget.size_bytes > reference.header.file_bytes:
        raise DoesNotFitError(
            f"a budget of {budget.size_bytes:,} bytes is larger than {reference.path.name} itself "
            f"({reference.header.file_bytes:,} bytes)",
            fix="use that file as it is, or give a smaller budget",
        )
    options = options_for(reference, imatrix, table, constraints)
    smallest = smallest_bytes(options, budget.fixed_bytes)
    if budget.size_bytes < smallest:
        bpw = smallest * 8 / reference.header.n_elements
        raise DoesNotFitError(
            f"a budget of {budget.size_bytes:,} bytes is too small for {reference.name}",
            fix=f"the smallest possible is {smallest:,} bytes ({smallest / 1e6:.1f} MB, {bpw:.3f} bpw)",
        )
    return _solve(reference, options, budget, constraints, incumbent)


def allocate(
    reference: Reference,
    imatrix: ImatrixStage,
    table: Mapping[str, Priced],
    budget: Budget,
    constraints: Constraints = NO_CONSTRAINTS,
    incumbent: Mapping[str, str] | None = None,
) -> Scheme:
    """:func:`choose` as a scheme."""
    solution = choose(reference, imatrix, table, budget, constraints, incumbent)
    return Scheme(
        types={name: solution.types[name] for name in quantizable(reference.header)},
        label=budget.label,
        architecture=reference.header.architecture,
        source=reference.name,
        source_sha256=reference.sha256,
        budget_bytes=budget.size_bytes,
        size_bytes=budget.fixed_bytes + solution.nbytes,
        predicted_kld=solution.cost,
        calibration=imatrix.dataset,
        imatrix_sha256=imatrix.sha256,
        llama_cpp_commit=installation().commit,
        dynrun=__version__,
    )


def smallest_bytes(options: Mapping[str, Sequence[Option]], fixed_bytes: int) -> int:
    """Bytes of the smallest file that the options allow."""
    return fixed_bytes + sum(min(option.nbytes for option in choices) for choices in options.values())


def solver_for(
    reference: Reference, budget: Budget, constraints: Constraints
) -> Callable[[Mapping[str, Sequence[Option]]], Solution]:
    """What solves other prices within the same limits."""
    return lambda options: _solve(reference, options, budget, constraints, None)


def _solve(
    reference: Reference,
    options: Mapping[str, Sequence[Option]],
    budget: Budget,
    constraints: Constraints,
    incumbent: Mapping[str, str] | None,
) -> Solution:
    stock = stock_seconds(reference, budget, constraints)
    limit = None if stock is None or not constraints.min_speed else stock / constraints.min_speed * (1 + _FORGIVEN)
    try:
        return solve(options, budget.size_bytes - budget.fixed_bytes, max_seconds=limit, incumbent=incumbent)
    except TooSlowError as error:
        assert stock is not None
        # Rounded down, so that what is offered is reachable.
        reachable = math.floor(stock / error.least_seconds * 1e4) / 1e4
        raise DoesNotFitError(
            f"no scheme of {budget.size_bytes:,} bytes has {constraints.min_speed:g} of the stock preset's "
            f"predicted tokens per second",
            fix=f"the largest possible is --min-speed {reachable:.4f}",
        ) from error


def stock_seconds(reference: Reference, budget: Budget, constraints: Constraints) -> float | None:
    """Predicted seconds per token of the budget's stock preset; None where no speed is asked for.

    Raises UsageError where the budget names no preset, or the table of speeds not all of its types.
    """
    if constraints.speed is None:
        return None
    if not budget.stock_types:
        raise UsageError("--min-speed is relative to a stock preset and there is none here", fix="leave it out")
    tensors = quantizable(reference.header)
    times = (
        seconds_per_token(constraints.speed, tensors[name], type_name, reference.header)
        for name, type_name in budget.stock_types.items()
        if name in tensors
    )
    return sum(times)
