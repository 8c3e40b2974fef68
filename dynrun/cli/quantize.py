"""`dynrun quantize`: a file from a scheme."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynrun.cli import options
from dynrun.cli.output import StageReporter, emit, megabytes, say

if TYPE_CHECKING:
    from dynrun.models import Reference
    from dynrun.quantize import Quantized
    from dynrun.scheme import Scheme
    from dynrun.stages import Settings

SplitMaxSize = Annotated[
    str | None,
    typer.Option(
        "--split-max-size",
        metavar="SIZE",
        help="Write shards of at most this size each: bytes, or as 500M, 2G (decimal); NAME-00001-of-0000N.gguf.",
    ),
]


@options.calibrated
def quantize(
    model: options.Model,
    scheme: Annotated[Path, typer.Argument(metavar="SCHEME", help="A scheme, as `allocate` and `make` write it.")],
    settings: Settings,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write the file (default: the cache).")
    ] = None,
    split_max_size: SplitMaxSize = None,
    feedback: Annotated[
        bool | None,
        typer.Option(
            "--feedback/--no-feedback", help="Round with error feedback, or plainly (default: as the scheme says)."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Make the file that a scheme describes.

    Example: dynrun quantize demo demo-Q3_K_M.scheme.toml --feedback
    """
    from dynrun.gguf.quantizable import quantizable
    from dynrun.models import made_path, open_reference
    from dynrun.quantize import check_scheme
    from dynrun.scheme import check_architecture, read_scheme

    shard_bytes = options.size_bytes(split_max_size) if split_max_size else None
    reference = open_reference(model)
    # The architecture first: of another model every tensor's name would be wrong, which says less.
    check_architecture(read_scheme(scheme), reference.header.architecture, reference.path)
    read = read_scheme(scheme, quantizable(reference.header))
    # Before the imatrix, which takes minutes.
    check_scheme(reference, read)
    if feedback is False or (feedback is None and not read.feedback):
        settings = replace(settings, feedback=None)
    made = _make(reference, read, settings, shard_bytes)
    paths = _publish(made.path, out or made_path(reference.name, read.label), shard_bytes)
    size = sum(one.stat().st_size for one in paths)
    data = {"path": str(paths[0]), "paths": list(map(str, paths)), "size_bytes": size, "types": dict(made.types)}
    emit(as_json, data, lambda: print("\n".join(f"{one}  {megabytes(one.stat().st_size)}" for one in paths)))


def _make(reference: Reference, scheme: Scheme, settings: Settings, shard_bytes: int | None) -> Quantized:
    from dynrun.quantize import make_from_scheme
    from dynrun.stages import feedback_of, read_texts, statistics

    reporter, n_threads = StageReporter(), settings.config.n_threads
    texts = read_texts(reference, settings, reporter)
    collected = statistics(reference, texts, settings, reporter)
    with feedback_of(reference, collected, settings) as feedback:
        reporter.stage("quantize", scheme.label)
        # What it is rounded with here; the scheme may come from elsewhere.
        scheme = replace(scheme, feedback=feedback.text if feedback else "")
        return make_from_scheme(
            *(reference, scheme, collected.imatrix),
            n_threads=n_threads,
            on_tensor=reporter.progress,
            split_max_size=shard_bytes,
            feedback=feedback,
        )


def _publish(made: Path, path: Path, shard_bytes: int | None) -> list[Path]:
    """The file under the name that the user wants, or its shards."""
    from dynrun.artifacts import link_or_copy
    from dynrun.quantize import split

    if shard_bytes is None:
        link_or_copy(made, path)
        return [path]
    say(f"split: shards of at most {shard_bytes:,} bytes")
    return split(made, path.with_name(path.name.removesuffix(".gguf")), shard_bytes)
