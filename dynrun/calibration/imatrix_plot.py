"""A picture of an imatrix: where the activations are large, how evenly they spread, which experts saw tokens.

Takes an imatrix, gives a PNG; matplotlib is imported here, inside the functions, and without its global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dynrun.artifacts import atomic_path
from dynrun.calibration.experts import Coverage, coverage
from dynrun.calibration.imatrix import Imatrix
from dynrun.calibration.imatrix_stats import TensorStatistics, statistics
from dynrun.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_HEIGHT, _MAX_WIDTH, _MAX_LABELS = 14.0, 26.0, 32
_UNSEEN = "#d62728"


def draw(imatrix: Imatrix, path: Path, *, min_tokens: int = 0) -> None:
    """Write the PNG ``path`` atomically.

    Layers × kinds of weight, in colour the mean Σx² of a token (log) and the entropy of x² over columns as a share of
    its maximum; where there are experts, layers × experts, in colour the tokens seen (log).
    ``min_tokens`` marks what counts as short. Weights outside the blocks are left out. Raises UsageError where none is
    in a block.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    rows = [row for row in statistics(imatrix) if row.block is not None]
    if not rows:
        raise UsageError("there is nothing to draw: no entry of the imatrix is in a block", fix="give another imatrix")
    # The tool's total is over all experts; a token meets the columns of one.
    rows = [replace(row, total=row.total * imatrix.sums[row.weight].shape[1] / row.n) for row in rows]
    figure = _figure(rows, _widest(coverage(imatrix, min_tokens=min_tokens)), min_tokens)
    figure.suptitle(_title(imatrix))
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure)
        figure.savefig(temporary, format="png", dpi=120)


def _figure(rows: Sequence[TensorStatistics], groups: Sequence[Coverage], min_tokens: int) -> Figure:
    from matplotlib.figure import Figure

    layers = sorted({row.block for row in rows if row.block is not None})
    kinds = sorted({row.tensor for row in rows})
    wide = [2.0 + 0.32 * len(kinds)] * 2
    if groups:
        wide.append(2.0 + 0.1 * max(30, *(group.n_expert for group in groups)))
    size = (min(max(sum(wide), 9.0), _MAX_WIDTH), min(max(3.2 + 0.2 * len(layers), 4.5), _MAX_HEIGHT))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(wide), squeeze=False, width_ratios=wide)[0]
    totals, shares = (np.full((len(layers), len(kinds)), np.nan) for _ in range(2))
    for row in rows:
        at = layers.index(row.block or 0), kinds.index(row.tensor)
        totals[at], shares[at] = row.total, row.entropy_share
    _heat(axes[0], totals, _log_norm(totals), "activations: mean Σx² of a token", "x² summed over columns (log)")
    _heat(axes[1], shares, None, "evenness: entropy over columns", "share of log2(columns)")
    for one in axes[:2]:
        one.set_xticks(range(len(kinds)), kinds, rotation=90)
        _label_layers(one, layers)
    if groups:
        _experts(axes[2], groups, min_tokens)
    return figure


def _experts(axes: Axes, groups: Sequence[Coverage], min_tokens: int) -> None:
    n_expert = max(group.n_expert for group in groups)
    tokens = np.full((len(groups), n_expert), np.nan)
    for i, group in enumerate(groups):
        tokens[i, : group.n_expert] = group.tokens
    label = "estimated, of a legacy file" if groups[0].estimated else "tokens (log)"
    _heat(axes, tokens, _log_norm(tokens), _experts_title(groups, min_tokens), label)
    _label_layers(axes, [-1 if group.block is None else group.block for group in groups])
    axes.set_xlabel("expert")


def _experts_title(groups: Sequence[Coverage], min_tokens: int) -> str:
    n, unseen = sum(group.n_expert for group in groups), sum(group.unseen for group in groups)
    title = f"tokens per expert: least {min(group.least for group in groups):,}, {unseen:,} of {n:,} unseen"
    title += " (red)" if unseen else ""
    return title + (f"\n{sum(g.short for g in groups):,} below {min_tokens:,}" if min_tokens else "")


def _widest(groups: Sequence[Coverage]) -> list[Coverage]:
    """One group per block: the one of most experts."""
    found: dict[int | None, Coverage] = {}
    for group in groups:
        if group.block not in found or group.n_expert > found[group.block].n_expert:
            found[group.block] = group
    return list(found.values())


def _heat(axes: Axes, values: npt.NDArray[np.float64], norm: Any, title: str, label: str) -> None:
    from matplotlib import colormaps

    # What is zero on a logarithmic scale (an expert without tokens) is red; what is not there is grey.
    colours = colormaps["viridis"].with_extremes(under=_UNSEEN, bad="#e0e0e0")
    shown = values if norm is None else np.where(values <= 0, norm.vmin / 10, values)
    image = axes.imshow(shown, norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
    axes.set_title(title, fontsize="medium")
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=axes, label=label, fraction=0.05, aspect=40)


def _log_norm(values: npt.NDArray[np.float64]) -> Any:
    from matplotlib.colors import LogNorm

    positive = values[np.isfinite(values) & (values > 0)]
    least, greatest = (float(positive.min()), float(positive.max())) if positive.size else (1.0, 1.0)
    return LogNorm(least, max(greatest, least * 1.1))


def _label_layers(axes: Axes, layers: Sequence[int]) -> None:
    step = -(-len(layers) // _MAX_LABELS)
    at = range(0, len(layers), step)
    axes.set_yticks(at, [str(layers[i]) for i in at])
    axes.set_ylabel("layer")


def _title(imatrix: Imatrix) -> str:
    names = ", ".join(imatrix.datasets) or "an unnamed text"
    names = names if len(names) <= 80 else names[:79] + "…"
    dense = [int(counts[0]) for counts in imatrix.seen.values() if len(counts) == 1]
    tokens = max(dense or [int(counts.sum()) for counts in imatrix.seen.values()])
    about = "about " if imatrix.estimated else ""
    # A dollar sign would begin a formula.
    return f"imatrix of {len(imatrix.sums)} weights from {names}: {about}{tokens:,} tokens".replace("$", r"\$")
