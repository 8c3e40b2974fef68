"""The wanted size in bytes: of a label, of bits per weight, or as given; and the stock presets to compare with.

Takes what the user asked for, gives a budget, or all that the curve over sizes needs; chooses no types.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dynrun.allocation.constraints import NO_CONSTRAINTS, Constraints
from dynrun.allocation.curve import Curve, trace
from dynrun.allocation.stage import Budget, Priced, choose, options_for
from dynrun.calibration.imatrix import read_imatrix
from dynrun.calibration.stage import ImatrixStage
from dynrun.errors import UsageError
from dynrun.gguf.quantizable import candidate_types, quantizable
from dynrun.models import Reference
from dynrun.quantize import STOCK_PRESETS, Preset, fixed_bytes, shard_overhead_bytes, stock_preset

# Over the stock preset of the same bits, as Unsloth's files of these names are.
XL_LABELS = {"Q2_K_XL": ("Q2_K", 1.017), "Q3_K_XL": ("Q3_K_M", 1.020), "Q4_K_XL": ("Q4_K_M", 1.015)}


# Presets for models that were trained for them.
_SPECIAL = frozenset({"TQ1_0", "TQ2_0", "MXFP4_MOE", "NVFP4", "Q1_0", "Q2_0"})
# Sizes that differ by less are called equal.
_EQUAL = 0.005


@dataclass(frozen=True)
class Target:
    """The wanted size, one of: a label, bits per weight over all tensors, bytes of the whole file."""

    quant: str | None = None
    bpw: float | None = None
    size_bytes: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.quant, self.bpw, self.size_bytes) if value is not None]
        if len(given) != 1:
            raise UsageError("say how large the file may be", fix="exactly one of --quant, --bpw and --size")
        # Not <= 0: a nan fails it too.
        if self.bpw is not None and not 0 < self.bpw < math.inf:
            raise UsageError(f"{self.bpw} bits per weight make no file", fix="give a positive --bpw")


def budget_for(
    reference: Reference, imatrix: ImatrixStage, target: Target, split_max_size: int | None = None
) -> tuple[Budget, Preset]:
    """The budget, and the stock preset to compare with: the label's own, or the largest that is no larger.

    What shards of ``split_max_size`` bytes have more than one file comes off the budget. Raises UsageError for an
    unknown label, DoesNotFitError where no such shard can hold the metadata.
    """
    if target.quant is not None:
        ftype, factor = XL_LABELS.get(target.quant, (target.quant, 1.0))
        if ftype not in STOCK_PRESETS:
            raise UsageError(f"no quant {target.quant!r}", fix=f"one of {', '.join((*STOCK_PRESETS, *XL_LABELS))}")
        preset = stock_preset(reference, ftype, imatrix)
        label, size = target.quant, int(preset.size_bytes * factor)
    else:
        size = target.size_bytes or int((target.bpw or 0) * reference.header.n_elements / 8)
        label = f"{size * 8 / reference.header.n_elements:.2f}bpw"
        preset = nearest_preset(reference, imatrix, size)
    return _budget(reference, imatrix, label, size, preset, split_max_size), preset


def budget_of(
    reference: Reference, imatrix: ImatrixStage, label: str, size_bytes: int, split_max_size: int | None = None
) -> tuple[Budget, Preset]:
    """:func:`budget_for` of a scheme that is known already: its label and size.

    To compare with: the label's own preset where it is of that size, give or take 0.5%, else the largest that is no
    larger.
    """
    preset = _namesake(reference, imatrix, label, size_bytes) or nearest_preset(reference, imatrix, size_bytes)
    return _budget(reference, imatrix, label, size_bytes, preset, split_max_size), preset


def _namesake(reference: Reference, imatrix: ImatrixStage, label: str, size_bytes: int) -> Preset | None:
    ftype, factor = XL_LABELS.get(label, (label, 1.0))
    if ftype not in STOCK_PRESETS:
        return None
    preset = stock_preset(reference, ftype, imatrix)
    return preset if abs(preset.size_bytes * factor - size_bytes) <= _EQUAL * size_bytes else None


def _budget(
    reference: Reference, imatrix: ImatrixStage, label: str, size: int, preset: Preset, split_max_size: int | None
) -> Budget:
    if split_max_size is not None:
        size -= shard_overhead_bytes(reference, imatrix, label, size, split_max_size)
    return Budget(label, size, fixed_bytes(reference, imatrix, label), preset.types)


def presets_of(reference: Reference, imatrix: ImatrixStage) -> list[Preset]:
    """Every stock preset that is meant for any model, smallest first; a dry run each."""
    presets = [stock_preset(reference, name, imatrix) for name in STOCK_PRESETS if name not in _SPECIAL]
    return sorted(presets, key=lambda preset: preset.size_bytes)


def nearest_preset(reference: Reference, imatrix: ImatrixStage, size_bytes: int) -> Preset:
    """The largest stock preset of at most ``size_bytes``; the smallest of all where none is."""
    presets = presets_of(reference, imatrix)
    fitting = [preset for preset in presets if preset.size_bytes <= size_bytes]
    return max(fitting, key=lambda p: p.size_bytes) if fitting else min(presets, key=lambda p: p.size_bytes)


def curve_for(
    reference: Reference,
    imatrix: ImatrixStage,
    table: Mapping[str, Priced],
    constraints: Constraints = NO_CONSTRAINTS,
    n_points: int = 60,
    plain: Mapping[str, Priced] | None = None,
) -> Curve:
    """The predicted KLD of every size, and the stock presets, priced by ``plain``, beside it (allocation/curve.py)."""
    presets = [(preset.ftype, preset.size_bytes, preset.types) for preset in presets_of(reference, imatrix)]
    # As of a label of the usual length, which differs by a byte at most.
    fixed = fixed_bytes(reference, imatrix, "0.00bpw")
    return trace(reference, imatrix, table, fixed, presets, constraints, n_points, plain)


@dataclass(frozen=True)
class _Free:
    """A tensor of which only the candidate types are known, all for nothing."""

    errors: Mapping[str, float]

    def price(self, type_name: str) -> float:
        return self.errors[type_name]


def check_budget(
    reference: Reference,
    imatrix: ImatrixStage,
    budget: Budget,
    menu: tuple[str, ...],
    constraints: Constraints = NO_CONSTRAINTS,
) -> None:
    """Raise DoesNotFitError or UsageError now rather than after the probes, where no scheme can meet what is asked."""
    choose(reference, imatrix, _free(reference, imatrix, menu), budget, constraints)


def check_constraints(
    reference: Reference, imatrix: ImatrixStage, menu: tuple[str, ...], constraints: Constraints
) -> None:
    """:func:`check_budget` where no size is wanted."""
    options_for(reference, imatrix, _free(reference, imatrix, menu), constraints)


def _free(reference: Reference, imatrix: ImatrixStage, menu: tuple[str, ...]) -> dict[str, _Free]:
    entries = read_imatrix(imatrix.path).sums
    metadata = reference.header.metadata
    return {
        name: _Free(dict.fromkeys(candidate_types(tensor, menu, entries, metadata), 0.0))
        for name, tensor in quantizable(reference.header).items()
    }
