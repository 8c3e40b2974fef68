"""`dynrun imatrix`: the importance matrix alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynrun.cli import options
from dynrun.cli.output import StageReporter, emit, say


def imatrix(
    model: options.Model,
    calibration: options.Calibration = "builtin",
    tokens: options.Tokens = 32768,
    ctx: options.CalibrationCtx = 512,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Copy the imatrix here too.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Collect the importance matrix on chat-templated conversations, in llama.cpp's GGUF format.

    Example: dynrun imatrix demo --out demo.imatrix.gguf
    """
    from dynrun.artifacts import atomic_path
    from dynrun.make import imatrix_stage
    from dynrun.models import open_reference

    made = imatrix_stage(open_reference(model), options.settings(calibration, tokens, ctx, None, None), StageReporter())
    path = made.path
    if out is not None:
        with atomic_path(out) as temporary:
            temporary.write_bytes(path.read_bytes())
        path = out
    if made.template == "plain":
        say("the model has no chat template: plain text was used")
    data = {
        "path": str(path),
        "sha256": made.sha256,
        "tokens": made.n_tokens,
        "sequences": made.n_sequences,
        "template": made.template,
        "cached": made.outcome.cached,
        "elapsed_s": round(made.outcome.elapsed_s, 2),
    }
    emit(as_json, data, lambda: print(f"{path}\n{made.n_sequences} sequences, {made.n_tokens:,} tokens"))
