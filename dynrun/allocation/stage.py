"""The allocation stage: from a sensitivity table and a budget to a scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dynrun import __version__
from dynrun.allocation.solve import Option, solve
from dynrun.calibration.stage import ImatrixStage
from dynrun.errors import DoesNotFitError
from dynrun.gguf.layout import tensor_bytes
from dynrun.gguf.quantizable import quantizable
from dynrun.llamacpp.build import installation
from dynrun.models import Reference
from dynrun.scheme import Scheme
from dynrun.sensitivity.stage import TensorSensitivity


@dataclass(frozen=True)
class Budget:
    """What the file may weigh: ``size_bytes`` of the whole file, of which ``fixed_bytes`` no type changes."""

    label: str
    size_bytes: int
    fixed_bytes: int


def allocate(
    reference: Reference, imatrix: ImatrixStage, table: Mapping[str, TensorSensitivity], budget: Budget
) -> Scheme:
    """The scheme with the least predicted KLD whose whole file is at most the budget.

    Raises DoesNotFitError for a budget smaller than the smallest file, or larger than the reference.
    """
    if budget.size_bytes > reference.header.file_bytes:
        raise DoesNotFitError(
            f"a budget of {budget.size_bytes:,} bytes is larger than {reference.path.name} itself "
            f"({reference.header.file_bytes:,} bytes)",
            fix="use that file as it is, or give a smaller budget",
        )
    tensors = quantizable(reference.header)
    options = {
        name: [Option(t, tensor_bytes(tensors[name], t), sensitivity.price(t)) for t in sensitivity.errors]
        for name, sensitivity in table.items()
    }
    smallest = budget.fixed_bytes + sum(min(o.nbytes for o in choices) for choices in options.values())
    if budget.size_bytes < smallest:
        raise DoesNotFitError(
            f"a budget of {budget.size_bytes:,} bytes is too small for {reference.name}",
            fix=f"the smallest possible is {smallest:,} bytes ({smallest / 1e6:.1f} MB)",
        )
    solution = solve(options, budget.size_bytes - budget.fixed_bytes)
    return Scheme(
        types={name: solution.types[name] for name in tensors},
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
