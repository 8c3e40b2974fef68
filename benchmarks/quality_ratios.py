"""Ratios of the KLD of two methods, cell by cell and over cells, with intervals that are paired by sequence.

Takes cells, gives plain data; measures nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from quality_rows import NO_FEEDBACK, OURS, OURS_PLAIN, STOCK, STOCK_FEEDBACK, Cell

from dynrun.metrics.intervals import N_RESAMPLES, Ratio

_SEED = 20261124

Place = tuple[str, str]
"""(label, text)."""
Cells = Mapping[Place, Cell]


def geometric_mean(values: Iterable[float]) -> float | None:
    """exp of the mean logarithm; None of nothing, 0 where one is 0."""
    found = list(values)
    if not found:
        return None
    return 0.0 if min(found) <= 0 else math.exp(math.fsum(map(math.log, found)) / len(found))


def by_method(cells: Iterable[Cell]) -> dict[str, dict[Place, Cell]]:
    """The cells of each method and seed."""
    methods: defaultdict[str, dict[Place, Cell]] = defaultdict(dict)
    for cell in cells:
        methods[cell.name][cell.label, cell.text] = cell
    return dict(methods)


def paired(numerator: Cells, denominator: Cells) -> dict[Place, Ratio]:
    """Ratios of mean KLD in the cells that both have, with their intervals."""
    found = {}
    for place, cell in numerator.items():
        if place in denominator and (ratio := cell.ratio_to(denominator[place])):
            found[place] = ratio
    return found


def ratios(numerator: Cells, denominator: Cells) -> dict[Place, float]:
    """The ratios alone."""
    return {place: ratio.value for place, ratio in paired(numerator, denominator).items()}


def interval(numerator: Cells, denominator: Cells) -> list[float] | None:
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


def worst_of(found: Mapping[Place, Ratio]) -> dict[str, Any] | None:
    """The cell of the largest ratio; None of nothing."""
    if not found:
        return None
    place = max(found, key=lambda one: found[one].value)
    return {"label": place[0], "text": place[1], "ratio": found[place].value, "ci95": list(found[place].ci95)}


def comparison(numerator: Cells, denominator: Cells) -> dict[str, Any] | None:
    """Geometric mean, worst cell and each label's geometric mean over the cells that both have; None of no cell.

    ``n_above``: how many of them have a paired 95% interval wholly above 1; ``above`` names them."""
    found = paired(numerator, denominator)
    if not found:
        return None
    above = [f"{label} {text}" for (label, text), ratio in found.items() if ratio.ci95[0] > 1]
    by_label: defaultdict[str, list[float]] = defaultdict(list)
    for (label, _), ratio in found.items():
        by_label[label].append(ratio.value)
    return {
        "n_cells": len(found),
        "geometric_mean": geometric_mean(ratio.value for ratio in found.values()),
        "ci95": interval(numerator, denominator),
        "worst_cell": worst_of(found),
        "n_above": len(above),
        "above": above,
        "labels": {label: geometric_mean(values) for label, values in by_label.items()},
    }


def family(label: str) -> str:
    """The kind of types that a preset's name stands for."""
    if label.startswith("IQ"):
        return "IQ"
    return "k-quants" if "_K" in label else "other"


def rounding(methods: Mapping[str, Cells]) -> dict[str, Any]:
    """What feedback gives on the same types, and what the types alone give, each a :func:`comparison`."""
    stock, with_feedback = methods.get(STOCK, {}), methods.get(STOCK_FEEDBACK, {})
    found = {
        f"{STOCK_FEEDBACK} over {STOCK}, {kind}": comparison(
            {place: cell for place, cell in with_feedback.items() if family(place[0]) == kind}, stock
        )
        for kind in ("k-quants", "IQ", "other")
    }
    found[f"{OURS} over {OURS_PLAIN}"] = comparison(methods.get(OURS, {}), methods.get(OURS_PLAIN, {}))
    found[f"{NO_FEEDBACK} over {STOCK}"] = comparison(methods.get(NO_FEEDBACK, {}), stock)
    return {name: one for name, one in found.items() if one}
