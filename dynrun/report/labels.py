"""Names beside points, each where it covers neither a point nor another name.

Takes axes whose limits are final, gives them annotations; a greedy choice among places around each point, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

Boxes = npt.NDArray[np.float64]

# Offsets in points, and how the text hangs there; what is far gets a line to its point.
_PLACES = (
    *((7, 3, "left", "bottom"), (7, -3, "left", "top"), (-7, 3, "right", "bottom"), (-7, -3, "right", "top")),
    *((0, 8, "center", "bottom"), (0, -8, "center", "top"), (8, 0, "left", "center"), (-8, 0, "right", "center")),
    *((16, 14, "left", "bottom"), (16, -14, "left", "top"), (-16, 14, "right", "bottom"), (-16, -14, "right", "top")),
    *((26, 28, "left", "bottom"), (26, -28, "left", "top"), (-26, 28, "right", "bottom"), (-26, -28, "right", "top")),
)
_FAR = 12
_POINT = 5.0


@dataclass(frozen=True)
class Named:
    """A point in data coordinates and its name."""

    x: float
    y: float
    text: str
    colour: str


def name_points(axes: Axes, points: Sequence[Named], line: Line2D) -> None:
    """Write the names, off ``line`` too; the layout of the figure must be done."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = axes.get_figure()
    assert figure is not None
    renderer = FigureCanvasAgg(figure.figure).get_renderer()  # type: ignore[no-untyped-call]
    pixel = figure.dpi / 72
    at = axes.transData.transform([(point.x, point.y) for point in points])
    on_line = _along(axes, line, 2 * pixel)
    taken = np.concatenate([_around(at, _POINT * pixel), _around(on_line, pixel)])
    frame = np.array(axes.get_window_extent(renderer).extents)
    for point, place in zip(points, at, strict=True):
        text = axes.text(0, 0, point.text, fontsize="x-small")
        box = text.get_window_extent(renderer)
        text.remove()
        boxes = [_placed(box.width, box.height, place, index, pixel) for index in range(len(_PLACES))]
        # The first of the best.
        index = int(np.argmin([_cost(one, taken, frame) for one in boxes]))
        _annotate(axes, point, index)
        taken = np.concatenate([taken, boxes[index][None]])


def _around(centres: Boxes, radius: float) -> Boxes:
    """Squares around points, [n, 4]: left, bottom, right, top."""
    return np.concatenate([centres - radius, centres + radius], axis=1)


def _along(axes: Axes, line: Line2D, step: float) -> Boxes:
    """Points of ``line`` every ``step`` pixels, [n, 2]."""
    corners = axes.transData.transform(np.column_stack(line.get_data()).reshape(-1, 2))
    found = [np.empty((0, 2))]
    for one, other in pairwise(corners):
        n = 2 + int(np.hypot(*(other - one)) / step)
        found.append(np.linspace(one, other, n))
    return np.concatenate(found)


def _annotate(axes: Axes, point: Named, index: int) -> None:
    dx, dy, ha, va = _PLACES[index]
    line = {"arrowstyle": "-", "color": point.colour, "linewidth": 0.6, "shrinkB": 3} if abs(dx) > _FAR else None
    axes.annotate(
        point.text,
        (point.x, point.y),
        xytext=(dx, dy),
        textcoords="offset points",
        ha=ha,
        va=va,
        fontsize="x-small",
        color=point.colour,
        arrowprops=line,
        annotation_clip=False,
    )


def _placed(width: float, height: float, at: Boxes, index: int, pixel: float) -> Boxes:
    """Where a text of this size would lie at a place, [4]."""
    dx, dy, ha, va = _PLACES[index]
    left = at[0] + dx * pixel - {"left": 0.0, "center": 0.5, "right": 1.0}[ha] * width
    bottom = at[1] + dy * pixel - {"bottom": 0.0, "center": 0.5, "top": 1.0}[va] * height
    return np.array([left, bottom, left + width, bottom + height])


def _cost(box: Boxes, taken: Boxes, frame: Boxes) -> float:
    """Pixels covered that are not free, or lie outside of the frame."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    return round(float(area - _common(box, frame[None]) + _common(box, taken)), 1)


def _common(box: Boxes, others: Boxes) -> float:
    """Area that ``box`` [4] shares with ``others`` [n, 4], in all."""
    size = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(np.prod(np.clip(size, 0, None), axis=1).sum())
