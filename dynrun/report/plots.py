"""The plots of measured files: KLD against size, by kind of text, by percentile; answers to questions.

Takes a :class:`~dynrun.report.data.Report`, gives :class:`~dynrun.report.style.Plot`s; those of tensors are in
heatmaps.py. All KLDs are in nats per token, on logarithmic axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dynrun.report.data import STOCK, CurvePoint, FileResult, Report
from dynrun.report.labels import Named, name_points
from dynrun.report.style import (
    LEAST_KLD,
    STOCK_COLOUR,
    STOCK_MARKER,
    Look,
    Plot,
    finished,
    label,
    lay_out,
    log_kld,
    look,
    new_figure,
)
from dynrun.report.text import kld as written

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The least that an axis of sizes spans, as a share of them.
_LEAST_WIDTH = 0.2
# Inches: what is taller is cut when it is printed.
_PAGE = 9.5
_PERCENTILES = (
    ("median", "median"),
    ("mean", "mean"),
    ("p90", "90%"),
    ("p99", "99%"),
    ("p999", "99.9%"),
    ("max", "maximum"),
)


def looks(report: Report) -> dict[str, Look]:
    """The look of each file, the same in all plots. A stock preset has the shape of the file that it is nearest to in
    size, hollow and grey: pairs are what is compared."""
    own = [file for file in report.files if file.kind != STOCK]
    found = {file.name: look(index) for index, file in enumerate(own)}
    for index, file in enumerate(file for file in report.files if file.kind == STOCK):
        pair = [found[one.name] for one in own if nearest(report, one) is file]
        like = pair[0] if pair else look(index)
        found[file.name] = Look(STOCK_COLOUR, like.marker, like.line, hollow=True)
    return found


def nearest(report: Report, file: FileResult) -> FileResult | None:
    """The stock preset nearest to ``file`` in size."""
    stock = [one for one in report.files if one.kind == STOCK]
    return min(stock, key=lambda one: abs(one.size_bytes - file.size_bytes), default=None)


def shown_files(report: Report) -> list[FileResult]:
    """The files that are no stock presets, and the preset nearest to each in size: a whole curve would be a tangle."""
    own = [file for file in report.files if file.kind != STOCK]
    near = {found.name for file in own if (found := nearest(report, file))}
    return [file for file in report.files if file.kind != STOCK or not own or file.name in near]


def size_plot(report: Report) -> Plot:
    """KLD against size, with the curve of stock presets; presets that a smaller one beats are hollow."""
    figure = new_figure(4.4)
    axes = figure.subplots()
    unit, unit_name = (1e9, "GB") if max(_sizes(report)) >= 2e9 else (1e6, "MB")
    _curve(axes, report, unit)
    styles = looks(report)
    for file in _apart(report):
        _point(axes, file, styles[file.name], unit)
    axes.set_xlabel(f"size of the file ({unit_name})")
    axes.set_ylabel("mean KLD (nats per token)")
    axes.margins(x=0.08, y=0.12)
    _widen(axes)
    log_kld(axes)
    lay_out(figure)
    name_points(axes, _names(report, styles, unit), axes.lines[0])
    listed = [f"{f.name} {written(f.kld.mean)} at {f.size_bytes / unit:.4g} {unit_name}" for f in _apart(report)]
    caption = f"Mean KLD with 95% intervals against the size of the file: {', '.join(listed)}."
    if _points(report):
        caption += " The line is the curve of stock presets; a hollow square is a preset that a smaller one equals."
    return finished(figure, "kld-size", "KLD against size", caption)


def _apart(report: Report) -> list[FileResult]:
    """The files that are no points of the curve."""
    points = {(point.size_bytes, point.kld) for point in _points(report)}
    return [f for f in report.files if f.kind != STOCK or (f.size_bytes, f.kld.mean) not in points]


def _points(report: Report) -> tuple[CurvePoint, ...]:
    """Of the curve: a single preset makes none, and is a file like the others."""
    return report.curve if len(report.curve) > 1 else ()


def _curve(axes: Axes, report: Report, unit: float) -> None:
    curve = sorted((p for p in _points(report) if p.on_curve), key=lambda point: point.size_bytes)
    sizes, klds = [p.size_bytes / unit for p in curve], [_shown(p.kld) for p in curve]
    axes.plot(sizes, klds, color=STOCK_COLOUR, marker=STOCK_MARKER, markersize=4)
    off = [p for p in _points(report) if not p.on_curve]
    sizes, klds = [p.size_bytes / unit for p in off], [_shown(p.kld) for p in off]
    axes.plot(sizes, klds, color=STOCK_COLOUR, marker=STOCK_MARKER, markersize=4, linestyle="none", fillstyle="none")


def _widen(axes: Axes) -> None:
    """Files of one size shall not look as if a thousandth of it were much."""
    low, high = axes.get_xlim()
    middle, half = (low + high) / 2, max((high - low) / 2, _LEAST_WIDTH * high / 2)
    axes.set_xlim(middle - half, middle + half)


def _sizes(report: Report) -> list[int]:
    return [*(file.size_bytes for file in report.files), *(point.size_bytes for point in report.curve), 1]


def _shown(value: float) -> float:
    return max(value, LEAST_KLD)


def _point(axes: Axes, file: FileResult, style: Look, unit: float) -> None:
    mean = _shown(file.kld.mean)
    axes.errorbar(
        file.size_bytes / unit,
        mean,
        yerr=_bars([mean], [file.kld.ci95]),
        **style.point,
        linestyle="none",
        capsize=3,
        elinewidth=1,
    )


def _bars(means: Sequence[float], intervals: Sequence[tuple[float, float]]) -> list[list[float]]:
    """Lengths of error bars, [2, n]; an interval that reaches zero ends where the axis does."""
    pairs = list(zip(means, intervals, strict=True))
    down = [max(0.0, mean - _shown(low)) for mean, (low, _) in pairs]
    return [down, [max(0.0, high - mean) for mean, (_, high) in pairs]]


def _names(report: Report, styles: Mapping[str, Look], unit: float) -> list[Named]:
    """The files first: they get the best places."""
    files = _apart(report)
    found = [Named(f.size_bytes / unit, _shown(f.kld.mean), label(f.name), styles[f.name].colour) for f in files]
    return found + [Named(p.size_bytes / unit, _shown(p.kld), label(p.ftype), STOCK_COLOUR) for p in _points(report)]


def domain_plot(report: Report) -> Plot | None:
    """Mean KLD on each kind of text, a row each; None where there is only one kind."""
    files = shown_files(report)
    names = list(dict.fromkeys(domain.name for file in files for domain in file.domains))
    if len(names) < 2:
        return None
    n, styles = len(files), looks(report)
    figure = new_figure(min(_PAGE, 0.9 + len(names) * (0.16 + 0.14 * n)))
    axes = figure.subplots()
    for index, file in enumerate(files):
        means = [_shown(domain.mean) for domain in file.domains]
        rows = [names.index(d.name) + (index - (n - 1) / 2) * 0.8 / n for d in file.domains]
        style, bars = styles[file.name], _bars(means, [d.ci95 for d in file.domains])
        axes.errorbar(
            *(means, rows),
            xerr=bars,
            **style.point,
            markersize=4,
            linestyle="none",
            elinewidth=1,
            capsize=2,
            label=label(file.name),
        )
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    log_kld(axes, "x")
    axes.grid(visible=False, axis="y")
    for row in range(1, len(names)):
        axes.axhline(row - 0.5, color="#d9d9d9", linewidth=0.6)
    axes.set_xlabel("mean KLD (nats per token)")
    _legend(axes, n)
    caption = f"Mean KLD with 95% intervals on {len(names)} kinds of text, a row each: {', '.join(names)}."
    return finished(figure, "kld-domains", "KLD by kind of text", caption)


def percentile_plot(report: Report) -> Plot:
    """Percentiles of the KLD of single tokens: the tail is what users notice."""
    figure = new_figure(4.0)
    axes = figure.subplots()
    styles, files = looks(report), shown_files(report)
    for file in files:
        style = styles[file.name]
        values = [_shown(getattr(file.kld, key)) for key, _ in _PERCENTILES]
        axes.plot(values, **style.point, linestyle=style.line, label=label(file.name))
    axes.set_xticks(range(len(_PERCENTILES)), [name for _, name in _PERCENTILES])
    axes.set_xlabel("of all scored tokens")
    axes.set_ylabel("KLD (nats)")
    log_kld(axes)
    axes.grid(visible=False, axis="x")
    _legend(axes, len(files))
    listed = ", ".join(f"{f.name} {written(f.kld.p99)}" for f in files)
    caption = f"Median, mean, percentiles and maximum of the tokens' KLD. At 99%: {listed}."
    return finished(figure, "kld-percentiles", "KLD percentiles", caption)


def _legend(axes: Axes, n: int) -> None:
    """Above the axes, where it covers nothing."""
    columns = min(n, 3)
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False, fontsize="small", numpoints=1
    )


def task_plots(report: Report) -> list[Plot]:
    """A plot for each task: accuracy of each file, a row each, with its interval."""
    tasks = dict.fromkeys(result.task for result in report.tasks)
    return [_task_plot(report, task, f"task-{index}") for index, task in enumerate(tasks, start=1)]


def _task_plot(report: Report, task: str, name: str) -> Plot:
    results = [result for result in report.tasks if result.task == task]
    styles = looks(report)
    figure = new_figure(0.9 + 0.3 * len(results))
    axes = figure.subplots()
    for row, result in enumerate(results):
        style = styles.get(result.name, Look("black", "o", "-"))
        bars = [[max(0.0, result.accuracy - result.ci95[0])], [max(0.0, result.ci95[1] - result.accuracy)]]
        at = [result.accuracy * 100], [row]
        scaled = [[100 * value for value in side] for side in bars]
        axes.errorbar(*at, xerr=scaled, **style.point, linestyle="none", capsize=3)
    axes.set_yticks(range(len(results)), [label(result.name) for result in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.grid(visible=True, axis="x")
    axes.set_xlabel("correct answers (%), with 95% intervals")
    listed = ", ".join(f"{r.name} {r.accuracy:.1%} of {r.n_questions:,}" for r in results)
    return finished(figure, name, task, f"Accuracy with 95% intervals in {task}: {listed}.")
