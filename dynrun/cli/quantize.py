"""`dynrun quantize`: a file from a scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynrun.cli import options
from dynrun.cli.output import StageReporter, emit, megabytes


def quantize(
    model: options.Model,
    scheme: Annotated[Path, typer.Argument(metavar="SCHEME", help="A scheme, as `allocate` and `make` write it.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write the file (default: the cache).")
    ] = None,
    calibration: options.Calibration = "builtin",
    tokens: options.Tokens = 32768,
    ctx: options.CalibrationCtx = 512,
    as_json: options.AsJson = False,
) -> None:
    """Make the file that a scheme describes.

    Example: dynrun quantize demo demo-Q3_K_M.scheme.toml
    """
    from dynrun.gguf.quantizable import quantizable
    from dynrun.make import imatrix_stage, publish
    from dynrun.models import made_path, open_reference
    from dynrun.quantize import make_from_scheme
    from dynrun.scheme import check_architecture, read_scheme

    reference = open_reference(model)
    # The architecture first: of another model every tensor's name would be wrong, which says less.
    check_architecture(read_scheme(scheme), reference.header.architecture, reference.path)
    read = read_scheme(scheme, quantizable(reference.header))
    settings = options.settings(calibration, tokens, ctx, None, None)
    reporter = StageReporter()
    imatrix = imatrix_stage(reference, settings, reporter)
    reporter.stage("quantize", str(scheme))
    made = make_from_scheme(reference, read, imatrix, n_threads=settings.config.n_threads, on_tensor=reporter.progress)
    path = publish(made, out or made_path(reference.name, read.label))
    data = {"path": str(path), "size_bytes": made.size_bytes, "types": dict(made.types)}
    emit(as_json, data, lambda: print(f"{path}  {megabytes(made.size_bytes)}"))
