"""`dynrun allocate`: the scheme alone, or the curve over all sizes."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options
from dynrun.cli.output import StageReporter, candidates_table, emit, megabytes
from dynrun.errors import UsageError

if TYPE_CHECKING:
    from dynrun.allocation.curve import Curve
    from dynrun.calibration.stage import ImatrixStage
    from dynrun.choose import Chosen, Settings, Texts
    from dynrun.models import Reference
    from dynrun.scheme import Scheme
    from dynrun.target import Target

SchemePath = Annotated[
    Path | None,
    typer.Option(
        "--scheme",
        metavar="FILE",
        help="A scheme, or a GGUF to take the types of. One without slopes is taken as it stands; one with them, for a "
        "fine-tune of its model or another size, is solved again, without probes.",
    ),
]


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
    scheme: SchemePath = None,
    as_json: options.AsJson = False,
) -> None:
    """Choose one type for each tensor: the least predicted KLD within the size and the constraints.

    Example: dynrun allocate demo --bpw 4.5 --pin 'token_embd=Q6_K' --out demo.toml. For a fine-tune, nothing probed:
    dynrun allocate tuned.gguf --scheme demo.toml
    """
    settings = replace(
        settings,
        probes=options.probes(probe_tokens, probe_error, probe_group, probe_devices),
        search=options.search(candidates, rounds),
    )
    if curve:
        _check_curve(settings, quant, bpw, size, scheme)
        _curve(model, settings, points, out, as_json)
    else:
        _scheme(model, settings, wanted(quant, bpw, size, scheme), scheme_for(model, scheme), out, as_json)


def wanted(quant: str | None, bpw: float | None, size: str | None, scheme: Path | None) -> Target | None:
    """The wanted size; with a scheme it may be left out. Raises UsageError."""
    if scheme is not None and quant is None and bpw is None and size is None:
        return None
    return options.target(quant, bpw, size)


def scheme_for(model: str, path: Path | None) -> Scheme | None:
    """The scheme in a file, or of a GGUF, if one is given. Raises UsageError where it is for another model."""
    from dynrun.gguf.header import read_header
    from dynrun.gguf.quantizable import quantizable
    from dynrun.models import resolve
    from dynrun.scheme import check_architecture
    from dynrun.scheme_gguf import open_scheme

    if path is None:
        return None
    # The architecture first: of another model every tensor's name would be wrong, which says less.
    scheme = open_scheme(path).scheme
    header = read_header(resolve(model).path)
    check_architecture(scheme, header.architecture, header.path)
    return open_scheme(path, quantizable(header)).scheme


def _scheme(
    model: str, settings: Settings, target: Target | None, known: Scheme | None, out: Path | None, as_json: bool
) -> None:
    from dynrun.choose import adopted, choose_scheme
    from dynrun.models import open_reference
    from dynrun.scheme import write_scheme

    reporter, reference = StageReporter(), open_reference(model)
    whole = adopted(known, reference) if known else None
    texts, imatrix = _calibrate(reference, settings, reporter)
    chosen = choose_scheme(reference, imatrix, texts, target, settings, reporter, reporter.log, scheme=whole)
    scheme = chosen.scheme
    path = out or Path(f"{reference.name}-{chosen.budget.label}.scheme.toml")
    write_scheme(scheme, path)
    data = {
        "path": str(path),
        "budget_bytes": scheme.budget_bytes,
        "size_bytes": scheme.size_bytes,
        "predicted_kld": scheme.predicted_kld,
        "measured_kld": scheme.measured_kld,
        **candidates_json(chosen),
        "ratio_ci95": None if chosen.search.ratio_ci95 is None else list(chosen.search.ratio_ci95),
        "types": dict(scheme.types),
    }
    emit(as_json, data, lambda: _show_scheme(chosen, path))


def candidates_json(chosen: Chosen) -> dict[str, Any]:
    """What was measured to choose, the best first; nothing of a known scheme."""
    found = chosen.search
    return {"candidates": [dict(trial) for trial in found.trials], "ratio_to_runner_up": found.ratio}


def _show_scheme(chosen: Chosen, path: Path) -> None:
    if chosen.search.trials:
        print(candidates_table(chosen.search))
    scheme = chosen.scheme
    predicted = "" if scheme.predicted_kld is None else f", predicted KLD {scheme.predicted_kld:.4f}"
    print(f"{scheme.size_bytes:,} of {scheme.budget_bytes:,} bytes{predicted}")
    print(f"{path}   (dynrun scheme show {path})")


def _calibrate(reference: Reference, settings: Settings, reporter: StageReporter) -> tuple[Texts, ImatrixStage]:
    from dynrun.choose import imatrix_stage, read_texts

    texts = read_texts(reference, settings, reporter)
    return texts, imatrix_stage(reference, texts, settings, reporter)


def _check_curve(
    settings: Settings, quant: str | None, bpw: float | None, size: str | None, scheme: Path | None
) -> None:
    """Raise UsageError, before anything is measured, for options that belong to one size."""
    if quant is not None or bpw is not None or size is not None:
        raise UsageError("--curve is of all sizes", fix="leave out --quant, --bpw and --size")
    if scheme is not None:
        raise UsageError("--curve is drawn from the model's own sensitivity", fix="leave out --scheme")
    if settings.constraints.speed is not None:
        raise UsageError("--min-speed is relative to the preset of one size", fix="leave it out with --curve")


def _curve(model: str, settings: Settings, points: int, out: Path | None, as_json: bool) -> None:
    from dynrun.allocation.curve import draw
    from dynrun.choose import sensitivity_stage
    from dynrun.models import open_reference
    from dynrun.target import check_constraints, curve_for

    reporter, reference = StageReporter(), open_reference(model)
    texts, imatrix = _calibrate(reference, settings, reporter)
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
