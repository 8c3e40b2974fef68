"""Options that several commands share, so that they are spelled and explained once."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.errors import UsageError

if TYPE_CHECKING:
    from dynrun.make import Settings
    from dynrun.sensitivity.stage import ProbeSettings
    from dynrun.target import Target

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A GGUF in F16, BF16 or F32, or a built-in name: demo, demo-moe.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quant = Annotated[
    str | None, typer.Option("--quant", help="The size of this stock preset, as Q4_K_M; or Q2_K_XL, Q3_K_XL, Q4_K_XL.")
]
Bpw = Annotated[float | None, typer.Option("--bpw", help="Bits per weight, over all tensors.")]
Size = Annotated[str | None, typer.Option("--size", help="Size of the file: bytes, or as 250M, 1.5G (decimal).")]
Calibration = Annotated[
    str,
    typer.Option(
        "--calibration",
        metavar="MIXTURE",
        help="Sources and their weights: builtin, self (the model's own answers), files (JSONL, JSON, Parquet, text), "
        "hf:owner/name[:config][:split]; as in builtin:2,self:3,mydata.jsonl:1.",
    ),
]
Tokens = Annotated[int, typer.Option("--tokens", min=64, help="Tokens to calibrate on.")]
CalibrationCtx = Annotated[
    int, typer.Option("--n-ctx", "--ctx", min=16, help="Longest sequence to calibrate on, in tokens.")
]
MinExpertTokens = Annotated[
    int,
    typer.Option(
        "--min-expert-tokens", min=0, help="Go on until each expert has seen so many; top up those that have not."
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", min=64, help="But to no more tokens than these (default: 4 times --tokens)."),
]
ChatTemplate = Annotated[
    Path | None, typer.Option("--chat-template", metavar="FILE", help="A Jinja template instead of the model's own.")
]
ImatrixFiles = Annotated[
    list[Path] | None,
    typer.Option("--imatrix", metavar="FILE", help="Use this imatrix (.gguf, .dat); several are merged."),
]
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
    from dynrun.target import Target

    return Target(quant.upper() if quant else None, bpw, size_bytes(size) if size else None)


def settings(
    calibration: Calibration = "builtin",
    tokens: Tokens = 32768,
    ctx: CalibrationCtx = 512,
    min_expert_tokens: MinExpertTokens = 256,
    max_tokens: MaxTokens = None,
    chat_template: ChatTemplate = None,
    imatrix: ImatrixFiles = None,
) -> Settings:
    """How to measure, from the options; without them the defaults."""
    from dynrun.calibration.stage import ImatrixSettings
    from dynrun.config import load_config
    from dynrun.make import Settings

    return Settings(
        calibration=calibration,
        chat_template=chat_template,
        imatrix_files=tuple(imatrix or ()),
        imatrix=ImatrixSettings(tokens, ctx, min_expert_tokens, max_tokens),
        config=load_config(),
    )


def calibrated(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the options of calibration in the place of its parameter ``settings``."""
    shared = inspect.signature(settings, eval_str=True, locals={"Settings": Any}).parameters
    own = inspect.signature(command).parameters.values()
    # Annotations are strings; that of `settings` is known to type checkers only.
    parameters = [
        parameter.replace(annotation=eval(parameter.annotation, command.__globals__))  # noqa: S307
        for parameter in own
        if parameter.name != "settings"
    ]
    # Before --json, which all commands end with.
    parameters[-1:-1] = shared.values()

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        how = {name: values.pop(name) for name in shared}
        command(settings=settings(**how), **values)

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def probes(n_tokens: int) -> ProbeSettings:
    """The probes' settings for ``n_tokens`` at the coarse type and half of them at the fine one."""
    from dynrun.sensitivity.stage import ProbeSettings

    default = ProbeSettings()
    return ProbeSettings(n_tokens, max(32, n_tokens // 2), default.n_ctx, default.max_rows)
