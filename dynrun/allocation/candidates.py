"""Candidate schemes of one size, from prices that are wrong in different ways.

Which model of the cost is right differs by model and size; the caller measures and decides. Proposes only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dynrun.allocation.operating_point import groups_of
from dynrun.allocation.solve import Option, Solution
from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.sensitivity.slopes import Slope

Options = Mapping[str, Sequence[Option]]
# Types, by options: what solves within the budget and the constraints.
Solver = Callable[[Options], Solution]
_SEED = 20261124
# Log-normal spread of the groups' factors: what the additive model may be wrong by, see operating_point.py.
_GROUP_SPREAD = 0.3
# A tensor's own factor spreads no less: slopes that are known well still stand for a model that is only nearly right.
_LEAST_SPREAD = 0.1
# A tensor alone shows less of its divergence the nearer it is to this, in nats per token.
_CEILING = 3.0


@dataclass(frozen=True)
class Candidate:
    """A scheme's types, how it was found, the bytes of its tensors, and its predicted KLD by the additive model (nats
    per token)."""

    name: str
    types: Mapping[str, str]
    nbytes: int
    predicted: float


def candidate(name: str, options: Options, types: Mapping[str, str]) -> Candidate:
    """``types`` at the prices of ``options``."""
    chosen = [next(option for option in options[tensor] if option.type == t) for tensor, t in types.items()]
    return Candidate(name, dict(types), sum(o.nbytes for o in chosen), math.fsum(o.cost for o in chosen))


def models(
    options: Options, slopes: Mapping[str, Slope], errors: Mapping[str, Mapping[str, float]]
) -> Iterator[tuple[str, Options]]:
    """The options at the prices of other models than the additive one with bent slopes."""
    yield "mean slopes", linear(options, slopes, errors, _mean)
    yield "coarse slopes", linear(options, slopes, errors, lambda own: own[-1])
    yield "fine slopes", linear(options, slopes, errors, lambda own: own[0])
    yield "saturating", saturating(options, _CEILING)
    for name, allowed in (("no codebook types", _is_no_codebook), ("no types under 2.5 bits", _has_bits)):
        if restricted_options := restricted(options, allowed):
            yield name, restricted_options


def _mean(slopes: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(math.log(max(slope, 1e-12)) for slope in slopes) / len(slopes))


def repriced(options: Options, price: Callable[[str, Option], float]) -> dict[str, list[Option]]:
    """The options with other costs."""
    return {
        name: [Option(o.type, o.nbytes, price(name, o), o.seconds) for o in choices]
        for name, choices in options.items()
    }


def by_groups(options: Options, factors: Mapping[str, float]) -> dict[str, list[Option]]:
    """Costs times the factor of their tensor's group."""
    groups = groups_of(options)
    return repriced(options, lambda name, o: o.cost * factors.get(groups[name], 1.0))


def saturating(options: Options, ceiling: float) -> dict[str, list[Option]]:
    """KLD as c·(1 − exp(−x/c)) of an additive x: a tensor alone shows less of its x the more it has."""
    # A probe at or above the ceiling would be infinite: from 0.95 of it on the price goes on in parallel to the KLD.
    most = 0.95 * ceiling

    def price(_: str, option: Option) -> float:
        return -ceiling * math.log1p(-min(option.cost, most) / ceiling) + max(0.0, option.cost - most)

    return repriced(options, price)


def linear(
    options: Options,
    slopes: Mapping[str, Slope],
    errors: Mapping[str, Mapping[str, float]],
    choose: Callable[[Sequence[float]], float],
) -> dict[str, list[Option]]:
    """One slope a tensor, that ``choose`` makes of its probes' slopes, by ascending error."""

    def price(name: str, option: Option) -> float:
        slope = slopes.get(name)
        own = [max(kld, 0.0) / error for error, kld in slope.points if error > 0] if slope else []
        if not own or option.type not in errors[name]:
            return option.cost
        error = errors[name][option.type]
        unseen = option.cost - slope.price(error) if slope else 0.0
        return choose(own) * error + max(0.0, unseen)

    return repriced(options, price)


def perturbed(options: Options, spreads: Mapping[str, float], seed: int) -> dict[str, list[Option]]:
    """Costs times log-normal factors: of the tensor's group, and of the tensor by its slope's standard error."""
    rng = np.random.default_rng([_SEED, seed])
    groups = groups_of(options)
    of_group = {group: rng.normal(0.0, _GROUP_SPREAD) for group in sorted(set(groups.values()))}
    own = {name: rng.normal(0.0, max(spreads.get(name, 0.0), _LEAST_SPREAD)) for name in sorted(options)}
    return repriced(options, lambda name, o: o.cost * math.exp(of_group[groups[name]] + own[name]))


def restricted(options: Options, allowed: Callable[[str], bool]) -> dict[str, list[Option]] | None:
    """Only types that are ``allowed``; None where that changes nothing or leaves a tensor without options."""
    found = {name: [o for o in choices if allowed(o.type)] for name, choices in options.items()}
    if not all(found.values()) or all(len(found[name]) == len(options[name]) for name in options):
        return None
    return found


def _is_no_codebook(type_name: str) -> bool:
    return not type_name.startswith("IQ")


def _has_bits(type_name: str) -> bool:
    return TENSOR_TYPES[type_name].bpw >= 2.5
