"""`dynrun sensitivity`: slopes and errors of every tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dynrun.cli import options
from dynrun.cli.output import StageReporter, emit

if TYPE_CHECKING:
    from dynrun.make import Settings
    from dynrun.sensitivity.stage import SensitivityStage


@options.calibrated
def sensitivity(
    model: options.Model,
    settings: Settings,
    probe_tokens: options.ProbeTokens = 1024,
    as_json: options.AsJson = False,
) -> None:
    """Measure how much the KLD grows with the error of each tensor.

    Example: dynrun sensitivity demo
    """
    from dynrun.make import imatrix_stage, read_texts, sensitivity_stage
    from dynrun.models import open_reference

    reference = open_reference(model)
    settings = replace(settings, probes=options.probes(probe_tokens))
    reporter = StageReporter()
    texts = read_texts(reference, settings, reporter)
    imatrix = imatrix_stage(reference, texts, settings, reporter)
    table = sensitivity_stage(reference, imatrix, texts, settings, reporter, reporter.log)
    data = {
        "path": str(table.path),
        "log": str(reporter.path),
        "forward_s": round(table.forward_s, 2),
        "probe_s": round(table.probe_s, 2),
        "elapsed_s": round(table.outcome.elapsed_s, 2),
        "cached": table.outcome.cached,
        "tensors": {
            name: {
                "slope_coarse": _slope(t.slope.coarse) if t.slope else None,
                "slope_fine": _slope(t.slope.fine) if t.slope else None,
            }
            for name, t in table.tensors.items()
        },
    }
    emit(as_json, data, lambda: _show(table))


def _slope(point: tuple[float, float] | None) -> float | None:
    return point[1] / point[0] if point and point[0] > 0 else None


def _show(table: SensitivityStage) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("tensor")
    shown.add_column("slope, coarse", justify="right")
    shown.add_column("slope, fine", justify="right")
    for name, tensor in table.tensors.items():
        points = (tensor.slope.coarse, tensor.slope.fine) if tensor.slope else (None, None)
        shown.add_row(name, *("–" if (s := _slope(p)) is None else f"{s:.4f}" for p in points))
    Console(highlight=False, width=100).print(shown)
    print(f"KLD (nats per token) per unit of weighted relative error\n{table.path}")
