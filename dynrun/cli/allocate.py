"""`dynrun allocate`: the scheme alone, or the curve over all sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options
from dynrun.cli.output import StageReporter, candidates_table, emit, megabytes
from dynrun.errors import UsageError

if TYPE_CHECKING:
    from dynrun.allocation.curve import Curve
    from dynrun.calibration.stage import ImatrixStage
    from dynrun.choose import Chosen
    from dynrun.models import Reference
    from dynrun.rounding.store import Feedback
    from dynrun.scheme import Scheme
    from dynrun.stages import Settings, Texts
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
    no_feedback: options.NoFeedback = False,
    as_json: options.AsJson = False,
) -> None:
    """Choose one type for each tensor: the least predicted KLD within the size and the constraints.

    Example: dynrun allocate demo --bpw 4.5 --pin 'token_embd=Q6_K'. Nothing probed: dynrun allocate t.gguf --scheme F
    """
    probes = options.probes(probe_tokens, probe_error, probe_group, probe_devices)
    settings = options.choosing(settings, probes, options.search(candidates, rounds), no_feedback)
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
    with _calibrated(reference, settings, reporter) as (texts, imatrix, feedback):
        inputs = (reference, imatrix, texts, target, settings, reporter, reporter.log)
        chosen = choose_scheme(*inputs, scheme=whole, feedback=feedback)
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


@contextmanager
def _calibrated(
    reference: Reference, settings: Settings, reporter: StageReporter
) -> Iterator[tuple[Texts, ImatrixStage, Feedback | None]]:
    from dynrun.stages import feedback_of, read_texts, statistics

    texts = read_texts(reference, settings, reporter)
    collected = statistics(reference, texts, settings, reporter)
    with feedback_of(reference, collected, settings) as feedback:
        yield texts, collected.imatrix, feedback


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
    from dynrun.choose import after_feedback
    from dynrun.models import open_reference
    from dynrun.stages import sensitivity_stage
    from dynrun.target import check_constraints, curve_for

    reporter, reference = StageReporter(), open_reference(model)
    with _calibrated(reference, settings, reporter) as (texts, imatrix, feedback):
        check_constraints(reference, imatrix, settings.menu, settings.constraints)
        table = sensitivity_stage(reference, imatrix, texts, settings, reporter, reporter.log)
        priced = after_feedback(table, feedback, reporter)
    reporter.stage("curve", f"{points} sizes and the stock presets")
    found = curve_for(reference, imatrix, priced.tensors, settings.constraints, points, table.tensors)
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
