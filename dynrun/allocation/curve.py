"""The whole curve: the least predicted KLD for every size, and the stock presets priced by the same table.

Takes a sensitivity table, gives points, a table of them and a PNG; measures nothing, so all KLDs are predictions.
matplotlib is imported inside the functions, and used without its global state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynrun.allocation.constraints import NO_CONSTRAINTS, Constraints
from dynrun.allocation.solve import Option, Solution, solve
from dynrun.allocation.stage import Priced, options_for, price_of, smallest_bytes
from dynrun.artifacts import atomic_path
from dynrun.calibration.stage import ImatrixStage
from dynrun.errors import UsageError
from dynrun.gguf.layout import tensor_bytes
from dynrun.gguf.quantizable import quantizable
from dynrun.models import Reference

_LARGEST = "Q8_0"
# A logarithmic axis has no zero.
_LEAST_KLD = 1e-9


@dataclass(frozen=True)
class Point:
    """A size of the whole file in bytes (at most), its bits per weight, and the least predicted KLD there."""

    size_bytes: int
    bpw: float
    predicted_kld: float


@dataclass(frozen=True)
class StockPoint:
    """A stock preset, and our prediction for its size; None where no scheme within the constraints is so small.

    ``estimated``: it uses types that the table has no errors of.
    """

    ftype: str
    size_bytes: int
    predicted_kld: float
    ours_predicted_kld: float | None
    estimated: bool


@dataclass(frozen=True)
class Curve:
    """``rows`` from the smallest file on, never rising; ``presets`` by size."""

    name: str
    rows: tuple[Point, ...]
    presets: tuple[StockPoint, ...]


def trace(
    reference: Reference,
    imatrix: ImatrixStage,
    table: Mapping[str, Priced],
    fixed_bytes: int,
    presets: Iterable[tuple[str, int, Mapping[str, str]]],
    constraints: Constraints = NO_CONSTRAINTS,
    n_points: int = 60,
    plain: Mapping[str, Priced] | None = None,
) -> Curve:
    """``n_points`` sizes from the smallest file to the one that is all Q8_0 (or to what the options can use).

    ``presets``: name, bytes of the file, types; priced by ``plain``, the table without feedback, if there is one. Each
    size is solved with the solution of the one before as its incumbent. Raises UsageError for a speed among the
    constraints: it is relative to the preset of one size.
    """
    if constraints.speed is not None:
        raise UsageError("--min-speed is relative to the preset of one size", fix="leave it out with --curve")
    options = options_for(reference, imatrix, table, constraints)
    stock = sorted(presets, key=lambda preset: preset[1])
    sizes = _sizes(options, fixed_bytes, _all_largest(reference, fixed_bytes), n_points)
    solved = _solve_all(options, fixed_bytes, [*sizes, *(size for _, size, _ in stock)])
    n = reference.header.n_elements
    return Curve(
        name=reference.name,
        rows=tuple(Point(size, size * 8 / n, solved[size].cost) for size in sizes),
        presets=tuple(_stock_point(name, size, types, plain or table, solved) for name, size, types in stock),
    )


def _all_largest(reference: Reference, fixed_bytes: int) -> int:
    tensors = quantizable(reference.header).values()
    return fixed_bytes + sum(tensor_bytes(t, _LARGEST) for t in tensors)


def _sizes(options: Mapping[str, Sequence[Option]], fixed_bytes: int, largest: int, n_points: int) -> list[int]:
    """Evenly spaced; the last is where nothing is left to gain, if that is below ``largest``."""
    smallest = smallest_bytes(options, fixed_bytes)
    best = [min(choices, key=lambda option: (option.cost, option.nbytes)) for choices in options.values()]
    largest = max(smallest, min(largest, fixed_bytes + sum(option.nbytes for option in best)))
    steps = max(n_points - 1, 1)
    return sorted({smallest + (largest - smallest) * step // steps for step in range(steps + 1)})


def _solve_all(options: Mapping[str, Sequence[Option]], fixed_bytes: int, sizes: Iterable[int]) -> dict[int, Solution]:
    """The solution of every size that is possible."""
    smallest = smallest_bytes(options, fixed_bytes)
    solved: dict[int, Solution] = {}
    known: Mapping[str, str] | None = None
    for size in sorted({size for size in sizes if size >= smallest}):
        solved[size] = solve(options, size - fixed_bytes, incumbent=known)
        known = solved[size].types
    return solved


def _stock_point(
    name: str, size: int, types: Mapping[str, str], table: Mapping[str, Priced], solved: Mapping[int, Solution]
) -> StockPoint:
    kld = math.fsum(price_of(row, types[tensor]) for tensor, row in table.items())
    estimated = any(types[tensor] not in row.errors for tensor, row in table.items())
    return StockPoint(name, size, kld, solved[size].cost if size in solved else None, estimated)


def draw(curve: Curve, path: Path) -> None:
    """Write the PNG ``path`` atomically: size against predicted KLD (log), the presets as named points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [row.size_bytes / 1e6 for row in curve.rows],
        [max(row.predicted_kld, _LEAST_KLD) for row in curve.rows],
        marker=".",
        label="best scheme",
    )
    # Beyond the curve there is nothing to compare with.
    shown = [p for p in curve.presets if p.size_bytes <= curve.rows[-1].size_bytes * 1.02]
    klds = [max(preset.predicted_kld, _LEAST_KLD) for preset in shown]
    axes.scatter([p.size_bytes / 1e6 for p in shown], klds, color="#d62728", zorder=3, label="stock preset")
    for preset, kld in zip(shown, klds, strict=True):
        at = preset.size_bytes / 1e6, kld
        axes.annotate(preset.ftype, at, xytext=(4, 4), textcoords="offset points", fontsize="x-small")
    axes.set_yscale("log")
    axes.set_xlabel("size of the file (MB)")
    axes.set_ylabel("predicted KLD (nats per token)")
    # A dollar sign would begin a formula.
    axes.set_title(f"{curve.name}: predicted KLD for every size".replace("$", r"\$"))
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure)
        figure.savefig(temporary, format="png", dpi=120)
