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
    from matplotlib.transforms import Bbox

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
    places = axes.transData.transform([(point.x, point.y) for point in points]).tolist()
    taken = [_around(x, y, _POINT * pixel) for x, y in places]
    taken += [_around(x, y, pixel) for x, y in _along(axes, line, 2 * pixel).tolist()]
    frame = axes.get_window_extent(renderer)
    for point, at in zip(points, places, strict=True):
        text = axes.text(0, 0, point.text, fontsize="x-small")
        box = text.get_window_extent(renderer)
        text.remove()
        index = min(
            range(len(_PLACES)),
            key=lambda i: (_cost(_moved(box, at, i, pixel), taken, frame), i),
        )
        _annotate(axes, point, index)
        taken.append(_moved(box, at, index, pixel))


def _around(x: float, y: float, radius: float) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def _along(axes: Axes, line: Line2D, step: float) -> npt.NDArray[np.float64]:
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


def _moved(box: Bbox, at: Sequence[float], index: int, pixel: float) -> Bbox:
    """Where a text of the size of ``box`` would lie."""
    from matplotlib.transforms import Bbox

    dx, dy, ha, va = _PLACES[index]
    left = at[0] + dx * pixel - {"left": 0.0, "center": 0.5, "right": 1.0}[ha] * box.width
    bottom = at[1] + dy * pixel - {"bottom": 0.0, "center": 0.5, "top": 1.0}[va] * box.height
    return Bbox.from_bounds(left, bottom, box.width, box.height)


def _cost(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> float:
    """Pixels covered that are not free, or lie outside of the frame."""
    outside = box.width * box.height - _common(box, frame)
    return round(outside + sum(_common(box, other) for other in taken), 1)


def _common(a: Bbox, b: Bbox) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0
