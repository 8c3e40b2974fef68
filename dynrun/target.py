"""The wanted size in bytes: of a label, of bits per weight, or as given; and the stock preset to compare with.

Takes what the user asked for, gives a budget; chooses no types.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynrun.allocation.stage import Budget, allocate
from dynrun.calibration.imatrix import read_imatrix
from dynrun.calibration.stage import ImatrixStage
from dynrun.errors import UsageError
from dynrun.gguf.quantizable import candidate_types, quantizable
from dynrun.models import Reference
from dynrun.quantize import STOCK_PRESETS, Preset, fixed_bytes, stock_preset
from dynrun.sensitivity.stage import TensorSensitivity

# Over the stock preset of the same bits, as Unsloth's files of these names are.
XL_LABELS = {"Q2_K_XL": ("Q2_K", 1.017), "Q3_K_XL": ("Q3_K_M", 1.020), "Q4_K_XL": ("Q4_K_M", 1.015)}


# Presets for models that were trained for them.
_SPECIAL = frozenset({"TQ1_0", "TQ2_0", "MXFP4_MOE", "NVFP4", "Q1_0", "Q2_0"})


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
        if self.bpw is not None and self.bpw <= 0:
            raise UsageError(f"{self.bpw} bits per weight make no file", fix="give a positive --bpw")


def budget_for(reference: Reference, imatrix: ImatrixStage, target: Target) -> tuple[Budget, Preset]:
    """The budget, and the stock preset to compare with: the label's own, or the largest that is no larger."""
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
    return Budget(label, size, fixed_bytes(reference, imatrix, label)), preset


def nearest_preset(reference: Reference, imatrix: ImatrixStage, size_bytes: int) -> Preset:
    """The largest stock preset of at most ``size_bytes``; the smallest of all where none is."""
    presets = [stock_preset(reference, name, imatrix) for name in STOCK_PRESETS if name not in _SPECIAL]
    fitting = [preset for preset in presets if preset.size_bytes <= size_bytes]
    return max(fitting, key=lambda p: p.size_bytes) if fitting else min(presets, key=lambda p: p.size_bytes)


def check_budget(reference: Reference, imatrix: ImatrixStage, budget: Budget, menu: tuple[str, ...]) -> None:
    """Raise DoesNotFitError now rather than after the probes, where no scheme can meet the budget."""
    entries = read_imatrix(imatrix.path).sums
    metadata = reference.header.metadata
    free = {
        name: TensorSensitivity(None, dict.fromkeys(candidate_types(tensor, menu, entries, metadata), 0.0))
        for name, tensor in quantizable(reference.header).items()
    }
    allocate(reference, imatrix, free, budget)
