"""What a table says of per-token measurements, by llama.cpp's definitions (tools/perplexity/perplexity.cpp).

Takes arrays with one value a scored token, gives plain numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynrun.metrics.intervals import clusters_of, mean_interval

Rows = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Summary:
    """Mean with its 95% interval, median, percentiles and maximum, in the unit of the values."""

    mean: float
    ci95: tuple[float, float]
    median: float
    p90: float
    p99: float
    p999: float
    max: float


def summarize(groups: Sequence[Rows]) -> Summary:
    """Summary of all values in ``groups``, one group a sequence. Raises ValueError where there are none.

    Percentiles are interpolated linearly between order statistics, as llama-perplexity's.
    """
    clusters = clusters_of(groups)
    median, p90, p99, p999, highest = np.quantile(np.concatenate(groups), (0.5, 0.9, 0.99, 0.999, 1.0)).tolist()
    return Summary(clusters.mean, mean_interval(clusters), median, p90, p99, p999, highest)


def rms_delta_p(log_p_reference: Rows, log_p_model: Rows) -> float:
    """Root mean square of the change of the true next token's probability (0 to 1; llama.cpp prints it in percent)."""
    difference = np.exp(log_p_model) - np.exp(log_p_reference)
    return float(np.sqrt(np.mean(difference * difference)))


def perplexity(log_p: Rows) -> float:
    """exp of the mean negative log-probability of the true next tokens."""
    return float(np.exp(-np.mean(log_p)))
