"""What the cells of benchmarks/quality.py say: geometric means, worst cells, prediction, a table and a plot.

Takes cells, gives plain data, Markdown and a PNG; measures nothing. Ratios are taken from the sums per sequence, so
they do not depend on the order in which cells were measured.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from quality_rows import OURS, STOCK, Cell

from dynrun.artifacts import atomic_path
from dynrun.metrics.intervals import N_RESAMPLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WMSE, WMSE_ROW, RANDOM = "wmse", "wmse-row", "random"
_FLOOR = 0.995
_SEED = 20261124
# What issue 4 asks: geometric mean to stock, worst cell, share under weighted MSE. Anything else is the 1.5B model's.
_WANTED = {"demo": (0.38, 0.85, 0.30), "demo-moe": (0.50, 0.85, 0.15)}
_WANTED_ELSE = (0.75, 1.0, 0.15)
_LEAST_BPW, _FACTOR, _RANK = 3.0, 1.5, 0.95
_COLORS = {STOCK: "#7f7f7f", OURS: "#1f77b4", WMSE: "#ff7f0e", WMSE_ROW: "#d62728", RANDOM: "#2ca02c"}

Place = tuple[str, str]
"""(label, text)."""


def geometric_mean(values: Iterable[float]) -> float | None:
    """exp of the mean logarithm; None of nothing, 0 where one is 0."""
    found = list(values)
    if not found:
        return None
    return 0.0 if min(found) <= 0 else math.exp(math.fsum(map(math.log, found)) / len(found))


def summarize(cells: Sequence[Cell]) -> dict[str, Any]:
    """The summary of each model, and the prediction over all."""
    by_model: defaultdict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_model[cell.model].append(cell)
    return {
        "models": {model: _summary(model, found) for model, found in by_model.items()},
        "prediction": prediction([cell for cell in cells if cell.method == OURS]),
    }


def _summary(model: str, cells: Sequence[Cell]) -> dict[str, Any]:
    methods = _by_method(cells)
    to_stock = {name: ratios(found, methods.get(STOCK, {})) for name, found in methods.items() if name != STOCK}
    under = {f"{OURS}/{name}": ratios(methods.get(OURS, {}), f) for name, f in methods.items() if name not in _ABOVE}
    means = {f"{name}/{STOCK}": geometric_mean(found.values()) for name, found in to_stock.items()}
    means |= {name: geometric_mean(found.values()) for name, found in under.items()}
    randoms = {name: found for name, found in under.items() if name.startswith(f"{OURS}/{RANDOM}:")}
    summary: dict[str, Any] = {
        "labels": _labels(cells),
        "texts": _texts(cells),
        "n_cells": {name: len(found) for name, found in to_stock.items()},
        "geometric_mean": means,
        "geometric_mean_ci95": {
            f"{OURS}/{name}": interval(methods.get(OURS, {}), found) for name, found in methods.items() if name != OURS
        },
        "worst_cell": _worst(methods, to_stock.get(OURS, {})),
        "ours_under_every_random": {
            "geometric_mean": _all(mean < 1 for name in randoms if (mean := means[name]) is not None),
            "every_cell": _all(ratio < 1 for found in randoms.values() for ratio in found.values()),
        },
        "prediction": prediction(list(methods.get(OURS, {}).values())),
        "sizes": _sizes(cells),
    }
    return {**summary, "wanted": _wanted(model, summary)}


_ABOVE = frozenset({STOCK, OURS})


def _by_method(cells: Iterable[Cell]) -> dict[str, dict[Place, Cell]]:
    methods: defaultdict[str, dict[Place, Cell]] = defaultdict(dict)
    for cell in cells:
        methods[cell.name][cell.label, cell.text] = cell
    return dict(methods)


def ratios(numerator: Mapping[Place, Cell], denominator: Mapping[Place, Cell]) -> dict[Place, float]:
    """Ratios of mean KLD in the cells that both have."""
    found = {}
    for place, cell in numerator.items():
        if place in denominator and (ratio := cell.ratio_to(denominator[place])):
            found[place] = ratio.value
    return found


def interval(numerator: Mapping[Place, Cell], denominator: Mapping[Place, Cell]) -> list[float] | None:
    """95% interval of the geometric mean of :func:`ratios`: sequences of each text are drawn with replacement, the same
    for both sides and for all labels (paired, as in dynrun/metrics/intervals.py). None of nothing."""
    found = ratios(numerator, denominator)
    if not found:
        return None
    rng, logs = np.random.default_rng(_SEED), np.zeros(N_RESAMPLES)
    drawn: dict[tuple[str, int], npt.NDArray[np.float64]] = {}
    for place in found:
        above, below = numerator[place].clusters, denominator[place].clusters
        n = len(above.counts)
        text = place[1], n
        if text not in drawn:
            drawn[text] = rng.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES).astype(np.float64)
        logs += np.log(drawn[text] @ np.array(above.sums)) - np.log(drawn[text] @ np.array(below.sums))
    low, high = np.quantile(np.exp(logs / len(found)), (0.025, 0.975))
    return [float(low), float(high)]


def prediction(cells: Sequence[Cell]) -> dict[str, Any]:
    """Rank correlation of predicted and measured KLD over ``cells``, and the worst factor between them from 3 bpw on.

    A label's one prediction stands beside its KLD on every text.
    """
    from scipy.stats import spearmanr

    known = [c for c in cells if c.predicted_kld is not None and c.predicted_kld > 0 and c.kld > 0]
    summary: dict[str, Any] = {"n_cells": len(known), "spearman": None, "worst_factor": None, "worst_cell": None}
    if len({c.predicted_kld for c in known}) > 1 and len({c.kld for c in known}) > 1:
        predicted, measured = [c.predicted_kld or 0.0 for c in known], [c.kld for c in known]
        summary["spearman"] = float(spearmanr(predicted, measured).statistic)
    fine = [c for c in known if c.bpw >= _LEAST_BPW]
    if fine:
        worst = max(fine, key=_factor)
        summary["worst_factor"] = _factor(worst)
        summary["worst_cell"] = {
            **{name: getattr(worst, name) for name in ("model", "label", "text", "bpw", "kld", "predicted_kld")}
        }
    return summary


def _factor(cell: Cell) -> float:
    return math.exp(abs(math.log(cell.kld / (cell.predicted_kld or math.nan))))


def _worst(methods: Mapping[str, Mapping[Place, Cell]], found: Mapping[Place, float]) -> dict[str, Any] | None:
    if not found:
        return None
    place = max(found, key=lambda one: found[one])
    ratio = methods[OURS][place].ratio_to(methods[STOCK][place])
    assert ratio is not None
    return {"label": place[0], "text": place[1], "ratio": ratio.value, "ci95": list(ratio.ci95)}


def _sizes(cells: Iterable[Cell]) -> dict[str, list[str]]:
    """Files over the budget, or under 99.5% of it: comparisons with those prove nothing."""
    over = {f"{c.label} {c.name}" for c in cells if c.bytes > c.budget_bytes}
    under = {f"{c.label} {c.name}" for c in cells if c.bytes < _FLOOR * c.budget_bytes}
    return {"over": sorted(over), "under": sorted(under)}


def _wanted(model: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the issue asks of this model, what was measured, and whether that meets it (None: not measured)."""
    to_stock, worst, share = _WANTED.get(model, _WANTED_ELSE)
    means, predicted = summary["geometric_mean"], summary["prediction"]
    cell = summary["worst_cell"]
    return {
        "ours/stock": _at_most(means.get(f"{OURS}/{STOCK}"), to_stock),
        "worst cell": _at_most(cell["ratio"] if cell else None, worst),
        f"ours/{WMSE}": _at_most(means.get(f"{OURS}/{WMSE}"), 1 - share),
        f"ours/{WMSE_ROW}": _at_most(means.get(f"{OURS}/{WMSE_ROW}"), 1 - share),
        "under every random": {"met": summary["ours_under_every_random"]["geometric_mean"]},
        "spearman": {
            "measured": predicted["spearman"],
            "least": _RANK,
            "met": None if predicted["spearman"] is None else predicted["spearman"] >= _RANK,
        },
        "factor": _at_most(predicted["worst_factor"], _FACTOR),
        "sizes": {"met": not any(summary["sizes"].values())},
    }


def _at_most(measured: float | None, most: float) -> dict[str, Any]:
    return {"measured": measured, "most": most, "met": None if measured is None else measured <= most}


def _all(found: Iterable[bool]) -> bool | None:
    every = list(found)
    return all(every) if every else None


def _labels(cells: Iterable[Cell]) -> list[str]:
    """Smallest files first."""
    sizes = {cell.label: cell.budget_bytes for cell in cells}
    return sorted(sizes, key=lambda label: (sizes[label], label))


def _texts(cells: Iterable[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.text for cell in cells))


def markdown(cells: Sequence[Cell], summary: Mapping[str, Any]) -> str:
    """A table a model, for docs/benchmarks.md."""
    parts = []
    for model, found in summary["models"].items():
        mine = [cell for cell in cells if cell.model == model]
        parts.append("\n".join([f"### {model}", "", *_table(mine), "", *_lines(found), ""]))
    return "\n".join(parts)


def _table(cells: Sequence[Cell]) -> list[str]:
    methods = _by_method(cells)
    others = [name for name in (WMSE, WMSE_ROW) if name in methods]
    heads = ["label", "text", "bytes, stock", "bytes, ours", "KLD, stock", "KLD, ours", "predicted", "ours/stock"]
    heads += [f"{name}/stock" for name in others] + ["random/stock"]
    rows = [heads, ["---"] * len(heads)]
    for label in _labels(cells):
        for text in _texts(cells):
            at = {name: found[label, text] for name, found in methods.items() if (label, text) in found}
            if at:
                rows.append([label, text, *_columns(at, others)])
    return [f"| {' | '.join(row)} |" for row in rows]


def _columns(at: Mapping[str, Cell], others: Sequence[str]) -> list[str]:
    stock, ours = at.get(STOCK), at.get(OURS)
    randoms = [cell.ratio_to(stock) for cell in at.values() if stock and cell.method == RANDOM]
    values = [ratio.value for ratio in randoms if ratio]
    return [
        f"{stock.bytes:,}" if stock else "",
        f"{ours.bytes:,}" if ours else "",
        f"{stock.kld:.4f}" if stock else "",
        f"{ours.kld:.4f}" if ours else "",
        f"{ours.predicted_kld:.4f}" if ours and ours.predicted_kld is not None else "",
        _with_interval(ours, stock),
        *(_with_interval(at.get(name), stock) for name in others),
        f"{min(values):.2f}–{max(values):.2f}" if values else "",
    ]


def _with_interval(cell: Cell | None, stock: Cell | None) -> str:
    ratio = cell.ratio_to(stock) if cell and stock else None
    return f"{ratio.value:.3f} ({ratio.ci95[0]:.3f}–{ratio.ci95[1]:.3f})" if ratio else ""


def _lines(summary: Mapping[str, Any]) -> list[str]:
    means = summary["geometric_mean"]
    intervals = summary["geometric_mean_ci95"]
    known = [
        f"{name} {mean:.3f}" + (" ({:.3f}–{:.3f})".format(*found) if (found := intervals.get(name)) else "")
        for name, mean in means.items()
        if mean is not None
    ]
    n_cells = max(summary["n_cells"].values(), default=0)
    lines = [f"Geometric means over {n_cells} cells: {', '.join(known) or 'none yet'}."]
    if worst := summary["worst_cell"]:
        low, high = worst["ci95"]
        lines.append(f"Worst cell: {worst['label']} on {worst['text']}, {worst['ratio']:.3f} ({low:.3f}–{high:.3f}).")
    predicted = summary["prediction"]
    if predicted["spearman"] is not None:
        lines.append(f"Predicted against measured KLD of ours: rank correlation {predicted['spearman']:.3f}.")
    if predicted["worst_factor"] is not None:
        lines.append(f"At 3 bpw and above they differ by a factor of {predicted['worst_factor']:.2f} at most.")
    return lines


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Write the PNG ``path`` atomically: KLD (log) over bits per weight of one model's files, a panel a text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts = _texts(cells)
    figure = Figure(figsize=(1.0 + 4.2 * len(texts), 4.2), layout="constrained")
    panels = figure.subplots(1, len(texts), squeeze=False, sharey=True)[0]
    for axes, text in zip(panels, texts, strict=True):
        _panel(axes, [cell for cell in cells if cell.text == text])
        axes.set_title(text)
    panels[0].set_ylabel("mean KLD, nats per token")
    panels[0].legend()
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure)
        figure.savefig(temporary, format="png", dpi=120)


def _panel(axes: Axes, cells: Sequence[Cell]) -> None:
    methods: defaultdict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        methods[cell.method].append(cell)
    for method in sorted(methods, key=lambda one: (one == OURS, one)):
        found = sorted(methods[method], key=lambda cell: cell.bpw)
        # Seeds of random stand beside each other: no line joins them.
        style = "x" if method == RANDOM else "o-"
        points = [cell.bpw for cell in found], [cell.kld for cell in found]
        axes.plot(*points, style, label=method, color=_COLORS.get(method), markersize=5, linewidth=1.3)
    axes.set_yscale("log")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.set_xlabel("bits per weight")
    for cell in methods.get(STOCK, []):
        axes.annotate(cell.label, (cell.bpw, cell.kld), fontsize=6, xytext=(3, 4), textcoords="offset points")
