"""A report as a page of its own (HTML, plots inside, nothing fetched) and as a model card (Markdown, plots beside).

Takes a :class:`Report`, gives text; writes nothing (folder.py). What comes out of files is escaped in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from dynrun.report.card import front_matter
from dynrun.report.data import STOCK, Report
from dynrun.report.heatmaps import slope_maps, type_maps
from dynrun.report.plots import domain_plot, percentile_plot, size_plot, task_plots
from dynrun.report.style import Plot, drawing
from dynrun.report.tables import (
    continuation_table,
    divergence_table,
    domain_table,
    file_table,
    headlines,
    percentile_table,
    task_table,
)
from dynrun.report.text import code_block, markdown, visible

_TERMS = (
    "KLD is the Kullback–Leibler divergence of a file's next-token distribution from the reference's, in nats per "
    "token; 0 is the reference itself. Intervals are of 95%, by a bootstrap over whole sequences; ratios are paired. "
    "Same top p: how often the likeliest token is the same. RMS Δp: root mean square of the change of the true next "
    "token's probability. The equal-size ratio is a file's KLD over that of the stock presets' curve at the same "
    "number of bytes. bpw: bits of the whole file per weight. Made by dynrun."
)


@dataclass(frozen=True)
class Plots:
    """All pictures of a report, by the part that they stand in."""

    measured: tuple[Plot, ...]
    tasks: tuple[Plot, ...]
    tensors: tuple[Plot, ...]

    @property
    def all(self) -> tuple[Plot, ...]:
        return self.measured + self.tasks + self.tensors


def draw(report: Report) -> Plots:
    """Every plot that there is something for."""
    with drawing():
        measured = (size_plot(report), domain_plot(report), percentile_plot(report))
        tensors = []
        for index, file in enumerate(file for file in report.files if file.types and file.kind != STOCK):
            tensors += type_maps(file.types, f"types-{index + 1}", f"Tensor types of {file.name}")
        tensors += slope_maps(report.slopes)
        return Plots(tuple(plot for plot in measured if plot), tuple(task_plots(report)), tuple(tensors))


def html(report: Report, plots: Plots) -> str:
    """The page."""
    # Our own drawing, whose texts matplotlib has escaped.
    inline = {
        name: [{"title": p.title, "caption": p.caption, "svg": Markup(p.svg)} for p in group]  # noqa: S704
        for name, group in _groups(plots).items()
    }
    return _environment(as_html=True).get_template("report.html.jinja").render(**_words(report), **inline)


def card(report: Report, plots: Plots) -> str:
    """The model card, front matter included; its pictures are ``plots/NAME.png``."""
    text = _environment(as_html=False).get_template("card.md.jinja").render(**_words(report), **_groups(plots))
    return front_matter(report) + "\n" + text


def _groups(plots: Plots) -> dict[str, tuple[Plot, ...]]:
    return {"measured": plots.measured, "task_plots": plots.tasks, "tensors": plots.tensors}


def _words(report: Report) -> Mapping[str, Any]:
    return {
        "report": report,
        "headlines": headlines(report),
        "divergence": divergence_table(report),
        "percentiles": percentile_table(report),
        "domains": domain_table(report),
        "continuations": continuation_table(report),
        "tasks": task_table(report),
        "files": file_table(report),
    }


@cache
def _environment(*, as_html: bool) -> Environment:
    """HTML escapes itself; in Markdown every value that is printed goes through :func:`markdown`."""
    folder = files("dynrun.report") / "templates"
    names = ("report.html.jinja", "card.md.jinja")
    sources = {name: (folder / name).read_text(encoding="utf-8") for name in names} | {"terms": _TERMS}
    environment = Environment(
        loader=DictLoader(sources),
        autoescape=as_html,  # noqa: S701 - Markdown is escaped by finalize
        finalize=_visible if as_html else markdown,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["code_block"] = code_block
    return environment


def _visible(value: object) -> object:
    return value if isinstance(value, Markup) else visible(str(value))
