"""Options that several commands share, so that they are spelled and explained once."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from dynrun.errors import UsageError

if TYPE_CHECKING:
    from dynrun.make import Settings, Target

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A GGUF in F16, BF16 or F32, or a built-in name: demo, demo-moe.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quant = Annotated[
    str | None, typer.Option("--quant", help="The size of this stock preset, as Q4_K_M; or Q2_K_XL, Q3_K_XL, Q4_K_XL.")
]
Bpw = Annotated[float | None, typer.Option("--bpw", help="Bits per weight, over all tensors.")]
Size = Annotated[str | None, typer.Option("--size", help="Size of the file: bytes, or as 250M, 1.5G (decimal).")]
Calibration = Annotated[str, typer.Option("--calibration", help="Calibration set: builtin.")]
Tokens = Annotated[int, typer.Option("--tokens", min=64, help="Tokens of the calibration split for the imatrix.")]
CalibrationCtx = Annotated[int, typer.Option("--ctx", min=16, help="Longest sequence of the imatrix, in tokens.")]
ProbeTokens = Annotated[
    int, typer.Option("--probe-tokens", min=32, help="Tokens of the probe split for each tensor's coarse probe.")
]
EvalTokens = Annotated[int, typer.Option("--eval-tokens", min=64, help="Tokens of the test split for the proof.")]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def size_bytes(text: str) -> int:
    """Bytes that ``text`` means: ``250M``, ``1.5GiB``, ``92000000``. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[KMG]I?)B?", text.strip().upper())
    if match is None:
        raise UsageError(f"{text!r} is no size", fix="write it as 250M, 1.5G or in bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def target(quant: str | None, bpw: float | None, size: str | None) -> Target:
    """The wanted size out of the three options. Raises UsageError unless exactly one is given."""
    from dynrun.make import Target

    return Target(quant.upper() if quant else None, bpw, size_bytes(size) if size else None)


def settings(
    calibration: str, tokens: int | None, ctx: int | None, probe_tokens: int | None, eval_tokens: int | None
) -> Settings:
    """How to measure, from the options; None means the default."""
    from dynrun.calibration.stage import ImatrixSettings
    from dynrun.config import load_config
    from dynrun.make import Settings
    from dynrun.sensitivity.stage import ProbeSettings

    default = Settings()
    imatrix = ImatrixSettings(tokens or default.imatrix.n_tokens, ctx or default.imatrix.n_ctx)
    probes = default.probes
    if probe_tokens:
        probes = ProbeSettings(probe_tokens, max(32, probe_tokens // 2), probes.n_ctx, probes.max_rows)
    return Settings(
        calibration=calibration,
        imatrix=imatrix,
        probes=probes,
        eval_tokens=eval_tokens or default.eval_tokens,
        config=load_config(),
    )
