"""Heat maps of a model's tensors, layer by kind: the type that each one got, and how much KLD its error costs.

Every cell says in letters what its colour says. Tensors outside of the blocks stand in a row above. At most
``_MAX_LAYERS`` layers a picture, so that each one fits on a page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.report.style import Plot, finished, label, new_figure
from dynrun.scheme_types import Slopes, block_of, kind_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

_MAX_LAYERS, _MAX_WIDTH, _MAX_NAME = 40, 14.0, 24
# Inches: of a cell, and of a letter over it.
_ROW, _COLUMN, _LETTER = 0.17, 0.62, 0.06
# Bits per weight at the ends of the colours.
_LEAST_BITS, _MOST_BITS = 1.5, 8.5
_UNKNOWN = "#e0e0e0"


@dataclass(frozen=True)
class _Cell:
    value: float
    text: str


def type_maps(types: Mapping[str, str], name: str, title: str) -> list[Plot]:
    """The types of one file, colour by bits per weight; none where nothing is known."""
    from matplotlib.colors import Normalize

    cells = {tensor: _Cell(TENSOR_TYPES[one].bpw, one) for tensor, one in types.items()}
    norm = Normalize(_LEAST_BITS, _MOST_BITS, clip=True)
    used = sorted(set(types.values()), key=lambda one: (TENSOR_TYPES[one].bpw, one))
    caption = f"Tensor types, from the fewest bits per weight to the most: {', '.join(used)}."
    return _maps(cells, _Legend(norm, "bits per weight", "{:g}".format), name, title, caption)


def slope_maps(slopes: Slopes, name: str = "slopes") -> list[Plot]:
    """α of every tensor: KLD over weighted error at the middle one of its probes, around 3.4 bits per weight."""
    from matplotlib.colors import LogNorm

    found = {tensor: alpha for tensor, points in slopes.items() if (alpha := _alpha(points)) is not None}
    if not found:
        return []
    cells = {tensor: _Cell(alpha, f"{alpha:.2g}") for tensor, alpha in found.items()}
    least, most = min(found.values()), max(found.values())
    norm = LogNorm(least, max(most, least * 1.1), clip=True)
    steepest = sorted(found, key=lambda tensor: (-found[tensor], tensor))[:3]
    caption = "KLD that a tensor's weighted error costs. Steepest: "
    caption += ", ".join(f"{tensor} {found[tensor]:.2g}" for tensor in steepest) + "."
    return _maps(cells, _Legend(norm, "α (nats per token)", "{:.2g}".format), name, "Sensitivity α", caption)


def _alpha(points: Sequence[tuple[float, float]]) -> float | None:
    """None where it was measured as nothing: a logarithm has no zero."""
    known = [(error, kld) for error, kld in points if error > 0]
    if not known:
        return None
    error, kld = known[(len(known) - 1) // 2]
    return kld / error if kld > 0 else None


@dataclass(frozen=True)
class _Legend:
    norm: Normalize
    title: str
    written: Callable[[float], str]


def _maps(cells: Mapping[str, _Cell], legend: _Legend, name: str, title: str, caption: str) -> list[Plot]:
    places = {tensor: block_of(tensor) for tensor in cells}
    layers = sorted({layer for layer, _ in places.values() if layer is not None})
    if not layers and not cells:
        return []
    parts = [layers[i : i + _MAX_LAYERS] for i in range(0, len(layers), _MAX_LAYERS)] or [[]]
    kinds = sorted({kind for layer, kind in places.values() if layer is not None}, key=kind_order)
    outside = [tensor for tensor, (layer, _) in places.items() if layer is None]
    found = []
    for index, part in enumerate(parts, start=1):
        figure = _figure(cells, part, kinds, sorted(outside) if index == 1 else [], legend)
        one = f"{name}-{index}" if len(parts) > 1 else name
        heading = f"{title}, layers {part[0]} to {part[-1]}" if len(parts) > 1 else title
        figure.suptitle(label(heading, 60), fontsize="medium")
        found.append(finished(figure, one, heading, caption))
    return found


def _figure(
    cells: Mapping[str, _Cell], layers: Sequence[int], kinds: Sequence[str], outside: Sequence[str], legend: _Legend
) -> Figure:
    columns, rows = max(len(kinds), len(outside)), len(layers)
    width = min(max(1.6 + _COLUMN * columns, 4.5), _MAX_WIDTH)
    across = width - 1.6
    heights = ([1.0] if outside else []) + ([float(rows)] if rows else [])
    over = [_over(heads, across) for heads in (outside, kinds if rows else ()) if heads]
    figure = new_figure(0.8 + sum(over) + _ROW * sum(heights), width)
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0].tolist()
    if outside:
        _grid(axes[0], [[cells[tensor] for tensor in outside]], outside, legend, across)
        axes[0].set_yticks([])
    if rows:
        table = [[cells.get(f"blk.{layer}.{kind}") for kind in kinds] for layer in layers]
        _grid(axes[-1], table, kinds, legend, across)
        axes[-1].set_yticks(range(rows), [str(layer) for layer in layers])
        axes[-1].set_ylabel("layer")
    _colour_bar(figure, axes, legend)
    return figure


def _over(heads: Sequence[str], across: float) -> float:
    """Inches that the names above ``heads``' columns take: as much as the longest where they must stand upright."""
    longest = _LETTER * max(len(_short(head)) for head in heads)
    return longest + 0.2 if longest > across / len(heads) else 0.3


def _grid(
    axes: Axes, table: Sequence[Sequence[_Cell | None]], heads: Sequence[str], legend: _Legend, across: float
) -> None:
    values = np.array([[np.nan if cell is None else cell.value for cell in row] for row in table])
    # Not imshow, which puts a coarse bitmap into the SVG.
    edges = np.arange(-0.5, len(heads)), np.arange(-0.5, len(table))
    shown = np.ma.masked_invalid(values)
    axes.pcolormesh(*edges, shown, cmap=_colours(), norm=legend.norm, edgecolors="white", linewidth=0.8)
    axes.invert_yaxis()
    for y, row in enumerate(table):
        for x, cell in enumerate(row):
            if cell is not None:
                # viridis is dark below its middle.
                ink = "white" if float(legend.norm(cell.value)) < 0.45 else "black"
                text = axes.text(x, y, cell.text, ha="center", va="center", color=ink, fontsize=6)
                text.set_in_layout(False)
    upright = _over(heads, across) > 0.3
    axes.set_xticks(range(len(heads)), [_short(head) for head in heads], rotation=90 if upright else 0)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize="x-small")
    for side in axes.spines.values():
        side.set_visible(False)


def _colours() -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"].with_extremes(bad=_UNKNOWN)


def _colour_bar(figure: Figure, axes: Sequence[Axes], legend: _Legend) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import FuncFormatter, NullFormatter

    bar = figure.colorbar(
        ScalarMappable(legend.norm, _colours()), ax=list(axes), label=legend.title, fraction=0.04, aspect=40, pad=0.02
    )
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: legend.written(value)))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


def _short(name: str) -> str:
    return label(name.removesuffix(".weight"), _MAX_NAME)
