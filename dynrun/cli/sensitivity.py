"""`dynrun sensitivity`: slopes and errors of every tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dynrun.cli import options
from dynrun.cli.output import StageReporter, emit

if TYPE_CHECKING:
    from dynrun.sensitivity.stage import SensitivityStage, TensorSensitivity
    from dynrun.stages import Settings


@options.calibrated
def sensitivity(
    model: options.Model,
    settings: Settings,
    probe_tokens: options.ProbeTokens = 1024,
    probe_error: options.ProbeError = 0.01,
    probe_group: options.ProbeGroup = "",
    probe_devices: options.ProbeDevices = "",
    as_json: options.AsJson = False,
) -> None:
    """Measure how much the KLD grows with the error of each tensor.

    Example: dynrun sensitivity demo
    """
    from dynrun.models import open_reference
    from dynrun.stages import imatrix_stage, read_texts, sensitivity_stage

    reference = open_reference(model)
    settings = replace(settings, probes=options.probes(probe_tokens, probe_error, probe_group, probe_devices))
    reporter = StageReporter()
    texts = read_texts(reference, settings, reporter)
    imatrix = imatrix_stage(reference, texts, settings, reporter)
    table = sensitivity_stage(reference, imatrix, texts, settings, reporter, reporter.log)
    data = {
        "path": str(table.path),
        "log": str(reporter.path),
        "doubt": table.doubt,
        "tokens": table.n_tokens,
        "forward_s": round(table.forward_s, 2),
        "probe_s": round(table.probe_s, 2),
        "error_spread": table.error_spread,
        "elapsed_s": round(table.outcome.elapsed_s, 2),
        "cached": table.outcome.cached,
        "tensors": {name: _slopes(tensor) for name, tensor in table.tensors.items()},
    }
    emit(as_json, data, lambda: _show(table))


def _slopes(tensor: TensorSensitivity) -> dict[str, float | None]:
    """Slopes at the coarsest and the finest type measured, and the relative standard error of their level."""
    points = [point for point in (tensor.slope.points if tensor.slope else ()) if point[0] > 0]
    if tensor.slope is None or not points:
        return {"slope_coarse": None, "slope_fine": None, "spread": None}
    (fine_error, fine), (coarse_error, coarse) = points[0], points[-1]
    return {
        "slope_coarse": coarse / coarse_error,
        "slope_fine": fine / fine_error,
        "spread": tensor.slope.spread,
    }


def _show(table: SensitivityStage) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("tensor")
    for heading in ("slope, coarse", "slope, fine", "standard error"):
        shown.add_column(heading, justify="right")
    for name, tensor in table.tensors.items():
        found = _slopes(tensor)
        coarse, fine, spread = (found[key] for key in ("slope_coarse", "slope_fine", "spread"))
        shown.add_row(
            name,
            *("–" if value is None else f"{value:.4f}" for value in (coarse, fine)),
            "–" if spread is None else f"{spread:.0%}",
        )
    Console(highlight=False, width=100).print(shown)
    print(f"KLD (nats per token) per unit of weighted relative error\n{table.path}")
    print(
        f"{table.n_tokens:,} tokens probed; what is not known better may cost {table.doubt:.2%} of the KLD; "
        f"errors of types within {table.error_spread:.1%} (95% of the tensors)"
    )
