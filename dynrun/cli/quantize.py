"""`dynrun quantize`: a file from a scheme."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynrun.cli import options
from dynrun.cli.output import StageReporter, emit, megabytes

if TYPE_CHECKING:
    from dynrun.make import Settings


@options.calibrated
def quantize(
    model: options.Model,
    scheme: Annotated[Path, typer.Argument(metavar="SCHEME", help="A scheme, as `allocate` and `make` write it.")],
    settings: Settings,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write the file (default: the cache).")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Make the file that a scheme describes.

    Example: dynrun quantize demo demo-Q3_K_M.scheme.toml
    """
    from dynrun.artifacts import link_or_copy
    from dynrun.gguf.quantizable import quantizable
    from dynrun.make import imatrix_stage, read_texts
    from dynrun.models import made_path, open_reference
    from dynrun.quantize import make_from_scheme
    from dynrun.scheme import check_architecture, read_scheme

    reference = open_reference(model)
    # The architecture first: of another model every tensor's name would be wrong, which says less.
    check_architecture(read_scheme(scheme), reference.header.architecture, reference.path)
    read = read_scheme(scheme, quantizable(reference.header))
    reporter = StageReporter()
    texts = read_texts(reference, settings, reporter)
    imatrix = imatrix_stage(reference, texts, settings, reporter)
    reporter.stage("quantize", str(scheme))
    made = make_from_scheme(reference, read, imatrix, n_threads=settings.config.n_threads, on_tensor=reporter.progress)
    path = out or made_path(reference.name, read.label)
    link_or_copy(made.path, path)
    data = {"path": str(path), "size_bytes": made.size_bytes, "types": dict(made.types)}
    emit(as_json, data, lambda: print(f"{path}  {megabytes(made.size_bytes)}"))
