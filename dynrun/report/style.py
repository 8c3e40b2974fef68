"""How plots look, and how a figure becomes bytes: the same ones for the same data.

Told apart by marker and line before colour (Okabe and Ito's palette, viridis), in print and by the colour-blind.
matplotlib is imported inside the functions; its global settings are put back, and the user's are not read.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from dynrun.report.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# https://jfly.uni-koeln.de/color/: blue, vermilion, green, purple, orange, sky blue, yellow is too pale on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vPX<>h"
_LINES = ("-", "--", "-.", ":")
STOCK_COLOUR, STOCK_MARKER = "#4d4d4d", "s"
# A logarithmic axis has no zero.
LEAST_KLD = 1e-9
_WIDTH = 7.2  # inches: the text of an A4 page
_DPI = 150


@dataclass(frozen=True)
class Plot:
    """A picture: ``name`` is its file's, ``caption`` says what it shows to those who do not see it."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Look:
    """How a file's points and lines are drawn, wherever it appears; stock presets are ``hollow``."""

    colour: str
    marker: str
    line: str
    hollow: bool = False

    @property
    def point(self) -> dict[str, Any]:
        """What matplotlib calls it."""
        return {"color": self.colour, "marker": self.marker, "fillstyle": "none" if self.hollow else "full"}


def look(index: int) -> Look:
    """The look of the file at ``index``: no two of the first sixty are alike."""
    return Look(
        _COLOURS[index % len(_COLOURS)],
        _MARKERS[index % len(_MARKERS)],
        _LINES[index % len(_LINES)],
    )


@contextmanager
def drawing() -> Iterator[None]:
    """Make and save figures in here."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": "dynrun",
                "svg.fonttype": "path",
                # A dollar sign in somebody's name must not begin a formula.
                "text.parse_math": False,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "axes.titlesize": "medium",
                "font.size": 9,
                "grid.color": "#d9d9d9",
                "grid.linewidth": 0.6,
                "lines.linewidth": 1.4,
                "lines.markersize": 6,
            }
        )
        yield


def new_figure(height: float, width: float = _WIDTH) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def lay_out(figure: Figure) -> None:
    """Place everything, once: each way to save a figure would do it again."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")


def finished(figure: Figure, name: str, title: str, caption: str) -> Plot:
    """``figure`` as SVG and PNG, without date and version."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    lay_out(figure)
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
    return Plot(name, title, caption, _inline(svg.getvalue().decode(), name), png.getvalue())


def _inline(svg: str, name: str) -> str:
    """The element alone, its ids told apart from those of other plots on the same page."""
    svg = svg[svg.index("<svg") :].rstrip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid=")', rf"\g<1>{name}-", svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)


def log_kld(axes: Axes, axis: str = "y") -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    getattr(axes, f"set_{axis}scale")("log")
    one = getattr(axes, f"{axis}axis")
    low, high = sorted(one.get_view_interval())
    seen = high / max(low, LEAST_KLD)
    if seen > 4:
        # Where two decades or less are seen, their ends alone would say little.
        one.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if seen < 300 else (1.0,), numticks=20))
    else:
        one.set_major_locator(MaxNLocator(6))
        one.set_minor_locator(NullLocator())
    one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    one.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, which="major")


def label(text: str, most: int = 34) -> str:
    """``text`` of somebody's file for a plot: one line, at most so long, in letters that the font has."""
    known = _letters()
    shown = "".join(c if ord(c) in known else "?" for c in visible(text))
    shown = shown if len(shown) <= most else f"{shown[: most // 2 - 1]}…{shown[-(most // 2) :]}"
    # A legend leaves out what begins with an underscore.
    return f" {shown}" if shown.startswith("_") else shown


@cache
def _letters() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())
