"""`dynrun allocate`: the scheme alone, or the curve over all sizes."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynrun.cli import options
from dynrun.cli.output import StageReporter, candidates_table, emit, megabytes
from dynrun.errors import UsageError

if TYPE_CHECKING:
    from dynrun.allocation.curve import Curve
    from dynrun.calibration.stage import ImatrixStage
    from dynrun.choose import Chosen, Settings, Texts
    from dynrun.models import Reference
    from dynrun.target import Target


@options.allocated
def allocate(
    model: options.Model,
    settings: Settings,
    quant: options.Quant = None,
    bpw: options.Bpw = None,
    size: options.Size = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="The predicted KLD of every size, with the stock presets: table and PNG.")
    ] = False,
    points: Annotated[int, typer.Option("--points", min=2, max=2000, help="Sizes on the curve.")] = 60,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The scheme's file, or the PNG or its folder (default: NAME-LABEL.scheme.toml here)."
        ),
    ] = None,
    probe_tokens: options.ProbeTokens = 1024,
    probe_error: options.ProbeError = 0.01,
    probe_group: options.ProbeGroup = "",
    probe_devices: options.ProbeDevices = "",
    candidates: options.Candidates = 10,
    rounds: options.Rounds = 3,
    as_json: options.AsJson = False,
) -> None:
    """Choose one type for each tensor: the least predicted KLD within the size and the constraints.

    Example: dynrun allocate demo --bpw 4.5 --pin 'token_embd=Q6_K' --out demo.toml
    """
    settings = replace(
        settings,
        probes=options.probes(probe_tokens, probe_error, probe_group, probe_devices),
        search=options.search(candidates, rounds),
    )
    if curve:
        _check_curve(settings, quant, bpw, size)
        _curve(model, settings, points, out, as_json)
    else:
        _scheme(model, settings, options.target(quant, bpw, size), out, as_json)


def _scheme(model: str, settings: Settings, wanted: Target, out: Path | None, as_json: bool) -> None:
    from dynrun.choose import choose_scheme
    from dynrun.scheme import write_scheme

    reporter = StageReporter()
    reference, texts, imatrix = _calibrate(model, settings, reporter)
    chosen = choose_scheme(reference, imatrix, texts, wanted, settings, reporter, reporter.log)
    scheme = chosen.scheme
    path = out or Path(f"{reference.name}-{chosen.budget.label}.scheme.toml")
    write_scheme(scheme, path)
    data = {
        "path": str(path),
        "budget_bytes": scheme.budget_bytes,
        "size_bytes": scheme.size_bytes,
        "predicted_kld": scheme.predicted_kld,
        "measured_kld": scheme.measured_kld,
        "candidates": [dict(trial) for trial in chosen.search.trials],
        "ratio_to_runner_up": chosen.search.ratio,
        "ratio_ci95": None if chosen.search.ratio_ci95 is None else list(chosen.search.ratio_ci95),
        "types": dict(scheme.types),
    }
    emit(as_json, data, lambda: _show_scheme(chosen, path))


def _show_scheme(chosen: Chosen, path: Path) -> None:
    print(candidates_table(chosen.search))
    scheme = chosen.scheme
    print(f"{scheme.size_bytes:,} of {scheme.budget_bytes:,} bytes, predicted KLD {scheme.predicted_kld or 0:.4f}")
    print(f"{path}   (dynrun scheme show {path})")


def _calibrate(model: str, settings: Settings, reporter: StageReporter) -> tuple[Reference, Texts, ImatrixStage]:
    from dynrun.choose import imatrix_stage, read_texts
    from dynrun.models import open_reference

    reference = open_reference(model)
    texts = read_texts(reference, settings, reporter)
    return reference, texts, imatrix_stage(reference, texts, settings, reporter)


def _check_curve(settings: Settings, quant: str | None, bpw: float | None, size: str | None) -> None:
    """Raise UsageError, before anything is measured, for options that belong to one size."""
    if quant is not None or bpw is not None or size is not None:
        raise UsageError("--curve is of all sizes", fix="leave out --quant, --bpw and --size")
    if settings.constraints.speed is not None:
        raise UsageError("--min-speed is relative to the preset of one size", fix="leave it out with --curve")


def _curve(model: str, settings: Settings, points: int, out: Path | None, as_json: bool) -> None:
    from dynrun.allocation.curve import draw
    from dynrun.choose import sensitivity_stage
    from dynrun.target import check_constraints, curve_for

    reporter = StageReporter()
    reference, texts, imatrix = _calibrate(model, settings, reporter)
    check_constraints(reference, imatrix, settings.menu, settings.constraints)
    table = sensitivity_stage(reference, imatrix, texts, settings, reporter, reporter.log)
    reporter.stage("curve", f"{points} sizes and the stock presets")
    found = curve_for(reference, imatrix, table.tensors, settings.constraints, points)
    path = _drawing(out, reference.name)
    draw(found, path)
    data = {
        "path": str(path),
        "rows": [asdict(row) for row in found.rows],
        "presets": [asdict(preset) for preset in found.presets],
    }
    emit(as_json, data, lambda: _show(found, path))


def _drawing(out: Path | None, name: str) -> Path:
    """The PNG that ``out`` means: itself, in it where it is a folder, with its suffix added otherwise."""
    if out is None or out.is_dir():
        return (out or Path()) / f"{name}-curve.png"
    return out if out.suffix.lower() == ".png" else out.with_name(f"{out.name}.png")


def _show(curve: Curve, path: Path) -> None:
    print("size_bytes,bpw,predicted_kld")
    for row in curve.rows:
        print(f"{row.size_bytes},{row.bpw:.4f},{row.predicted_kld:.6g}")
    print("\nftype,size_bytes,predicted_kld,ours_predicted_kld,estimated")
    for preset in curve.presets:
        ours = "" if preset.ours_predicted_kld is None else f"{preset.ours_predicted_kld:.6g}"
        line = f"{preset.ftype},{preset.size_bytes},{preset.predicted_kld:.6g},{ours}"
        print(f"{line},{'yes' if preset.estimated else 'no'}")
    print(f"\n{path}: {megabytes(curve.rows[0].size_bytes)} to {megabytes(curve.rows[-1].size_bytes)}")
