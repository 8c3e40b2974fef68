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

from quality_ratios import Cells, by_method, geometric_mean, interval, paired, ratios, rounding, worst_of
from quality_rows import NO_FEEDBACK, OURS, OURS_PLAIN, STOCK, STOCK_FEEDBACK, Cell

from dynrun.artifacts import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WMSE, WMSE_ROW, RANDOM = "wmse", "wmse-row", "random"
_FLOOR = 0.995
# What issue 4 asks: geometric mean to stock, worst cell, share under weighted MSE. Anything else is the 1.5B model's.
_WANTED = {"demo": (0.38, 0.85, 0.30), "demo-moe": (0.50, 0.85, 0.15)}
_WANTED_ELSE = (0.75, 1.0, 0.15)
_LEAST_BPW, _FACTOR, _RANK = 3.0, 1.5, 0.95
_COLORS = {
    # The same types have the same color.
    STOCK: "#7f7f7f",
    STOCK_FEEDBACK: "#7f7f7f",
    OURS: "#1f77b4",
    OURS_PLAIN: "#1f77b4",
    NO_FEEDBACK: "#9467bd",
    WMSE: "#ff7f0e",
    WMSE_ROW: "#d62728",
    RANDOM: "#2ca02c",
}
# Seeds of random stand beside each other: no line joins them.
_STYLES = {RANDOM: "x", STOCK_FEEDBACK: "s--", OURS_PLAIN: "s--"}


def summarize(cells: Sequence[Cell]) -> dict[str, Any]:
    """The summary of each model, and the prediction over all."""
    by_model: defaultdict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_model[cell.model].append(cell)
    mine = [cell for found in by_model.values() for cell in found if cell.method == compared(found)]
    return {
        "models": {model: _summary(model, found) for model, found in by_model.items()},
        "prediction": prediction(mine),
    }


def compared(cells: Iterable[Cell]) -> str:
    """The method that the others are compared with: ours, and where that was not measured, ours without feedback."""
    known = {cell.method for cell in cells}
    return NO_FEEDBACK if NO_FEEDBACK in known and OURS not in known else OURS


def _summary(model: str, cells: Sequence[Cell]) -> dict[str, Any]:
    methods, name = by_method(cells), compared(cells)
    mine, stock = methods.get(name, {}), methods.get(STOCK, {})
    to_stock = {other: ratios(found, stock) for other, found in methods.items() if other != STOCK}
    # Of its own types in another rounding: under "rounding".
    others = {other: found for other, found in methods.items() if other not in (STOCK, name, OURS_PLAIN)}
    under = {f"{name}/{other}": ratios(mine, found) for other, found in others.items()}
    means = {f"{other}/{STOCK}": geometric_mean(found.values()) for other, found in to_stock.items()}
    means |= {pair: geometric_mean(found.values()) for pair, found in under.items()}
    intervals = {f"{name}/{other}": interval(mine, found) for other, found in others.items()}
    if STOCK in methods:
        intervals[f"{name}/{STOCK}"] = interval(mine, stock)
    summary: dict[str, Any] = {
        "labels": _labels(cells),
        "texts": _texts(cells),
        "compared": name,
        "n_cells": {other: len(found) for other, found in to_stock.items()},
        "geometric_mean": means,
        "geometric_mean_ci95": intervals,
        "worst_cell": worst_of(paired(mine, stock)),
        "under_every_random": _randoms(mine, methods),
        "rounding": rounding(methods),
        "prediction": prediction(list(mine.values())),
        "sizes": _sizes(cells),
    }
    return {**summary, "wanted": _wanted(model, summary)}


def _randoms(mine: Cells, methods: Mapping[str, Cells]) -> dict[str, bool | None]:
    found = [ratios(mine, cells) for name, cells in methods.items() if name.startswith(f"{RANDOM}:")]
    means = (geometric_mean(one.values()) for one in found)
    return {
        "geometric_mean": _all(mean < 1 for mean in means if mean is not None),
        "every_cell": _all(ratio < 1 for one in found for ratio in one.values()),
    }


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


def _sizes(cells: Iterable[Cell]) -> dict[str, list[str]]:
    """Files over the budget, or under 99.5% of it: comparisons with those prove nothing. Stock types with our metadata
    are over it by nature."""
    over = {f"{c.label} {c.name}" for c in cells if c.bytes > c.budget_bytes and c.method != STOCK_FEEDBACK}
    under = {f"{c.label} {c.name}" for c in cells if c.bytes < _FLOOR * c.budget_bytes}
    return {"over": sorted(over), "under": sorted(under)}


def _wanted(model: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the issue asks of this model, what was measured, and whether that meets it (None: not measured)."""
    to_stock, worst, share = _WANTED.get(model, _WANTED_ELSE)
    means, predicted = summary["geometric_mean"], summary["prediction"]
    cell, name = summary["worst_cell"], summary["compared"]
    return {
        f"{name}/{STOCK}": _at_most(means.get(f"{name}/{STOCK}"), to_stock),
        "worst cell": _at_most(cell["ratio"] if cell else None, worst),
        f"{name}/{WMSE}": _at_most(means.get(f"{name}/{WMSE}"), 1 - share),
        f"{name}/{WMSE_ROW}": _at_most(means.get(f"{name}/{WMSE_ROW}"), 1 - share),
        "under every random": {"met": summary["under_every_random"]["geometric_mean"]},
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


# Beside stock in the table of cells, where measured.
_OTHERS = (STOCK_FEEDBACK, NO_FEEDBACK, WMSE, WMSE_ROW)


def _table(cells: Sequence[Cell]) -> list[str]:
    methods, name = by_method(cells), compared(cells)
    others = [other for other in _OTHERS if other in methods and other != name]
    heads = ["label", "text", "bytes, stock", f"bytes, {name}", "KLD, stock", f"KLD, {name}", "predicted"]
    heads += [f"{name}/stock", *(f"{other}/stock" for other in others), "random/stock"]
    pair = OURS in methods and OURS_PLAIN in methods
    heads += [f"{OURS} over {OURS_PLAIN}"] if pair else []
    rows = [heads, ["---"] * len(heads)]
    for label in _labels(cells):
        for text in _texts(cells):
            at = {one: found[label, text] for one, found in methods.items() if (label, text) in found}
            if at:
                last = [_with_interval(at.get(OURS), at.get(OURS_PLAIN))] if pair else []
                rows.append([label, text, *_columns(at, name, others), *last])
    return [f"| {' | '.join(row)} |" for row in rows]


def _columns(at: Mapping[str, Cell], name: str, others: Sequence[str]) -> list[str]:
    stock, mine = at.get(STOCK), at.get(name)
    randoms = [cell.ratio_to(stock) for cell in at.values() if stock and cell.method == RANDOM]
    values = [ratio.value for ratio in randoms if ratio]
    return [
        f"{stock.bytes:,}" if stock else "",
        f"{mine.bytes:,}" if mine else "",
        f"{stock.kld:.4f}" if stock else "",
        f"{mine.kld:.4f}" if mine else "",
        f"{mine.predicted_kld:.4f}" if mine and mine.predicted_kld is not None else "",
        _with_interval(mine, stock),
        *(_with_interval(at.get(other), stock) for other in others),
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
    lines += [_rounding_line(name, one) for name, one in summary["rounding"].items()]
    predicted = summary["prediction"]
    if predicted["spearman"] is not None:
        lines.append(
            f"Predicted against measured KLD of {summary['compared']}: rank correlation {predicted['spearman']:.3f}."
        )
    if predicted["worst_factor"] is not None:
        lines.append(f"At 3 bpw and above they differ by a factor of {predicted['worst_factor']:.2f} at most.")
    return lines


def _rounding_line(name: str, found: Mapping[str, Any]) -> str:
    mean, (low, high), worst = found["geometric_mean"], found["ci95"], found["worst_cell"]
    where = f"{worst['label']} on {worst['text']} {worst['ratio']:.3f} ({worst['ci95'][0]:.3f}–{worst['ci95'][1]:.3f})"
    above = f"{found['n_above']} wholly above 1" + (f" ({', '.join(found['above'])})" if found["above"] else "")
    by_label = ", ".join(f"{label} {one:.3f}" for label, one in found["labels"].items())
    cells = f"{found['n_cells']} cells, {above}"
    return f"{name}: {mean:.3f} ({low:.3f}–{high:.3f}) over {cells}; worst {where}; by label {by_label}."


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
        style = _STYLES.get(method, "o-")
        points = [cell.bpw for cell in found], [cell.kld for cell in found]
        axes.plot(*points, style, label=method, color=_COLORS.get(method), markersize=5, linewidth=1.3)
    axes.set_yscale("log")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.set_xlabel("bits per weight")
    for cell in methods.get(STOCK, []):
        axes.annotate(cell.label, (cell.bpw, cell.kld), fontsize=6, xytext=(3, 4), textcoords="offset points")
