"""Options that several commands share, so that they are spelled and explained once."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.errors import UsageError

if TYPE_CHECKING:
    from dynrun.allocation.constraints import Constraints
    from dynrun.allocation.search import SearchSettings
    from dynrun.sensitivity.stage import ProbeSettings
    from dynrun.stages import Settings
    from dynrun.target import Target

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A GGUF in F16, BF16 or F32, or a built-in name: demo, demo-moe.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quant = Annotated[
    str | None, typer.Option("--quant", help="The size of this stock preset, as Q4_K_M; or Q2_K_XL, Q3_K_XL, Q4_K_XL.")
]
Bpw = Annotated[float | None, typer.Option("--bpw", help="Bits of the whole file per weight of the model.")]
Size = Annotated[
    str | None, typer.Option("--size", help="Size of the whole file: bytes, or as 250MB, 1.5GB, 240MiB, 1GiB.")
]
Types = Annotated[
    str, typer.Option("--types", metavar="MENU", help="all, new, k (no IQ types), arm; or types as Q4_K,Q6_K,Q8_0.")
]
_RULE = "'REGEX=TYPE'"
Pins = Annotated[
    list[str] | None,
    typer.Option("--pin", metavar=_RULE, help="Tensors of such names get this type, in the menu or not. Repeatable."),
]
Minima = Annotated[
    list[str] | None, typer.Option("--min", metavar=_RULE, help="Such tensors get no fewer bits than this type.")
]
Maxima = Annotated[
    list[str] | None, typer.Option("--max", metavar=_RULE, help="Such tensors get no more bits than this type.")
]
SpeedTablePath = Annotated[
    Path | None,
    typer.Option("--speed-table", metavar="FILE", help="TOML: [ns_per_weight], nanoseconds per weight of each type."),
]
MinSpeed = Annotated[
    float | None,
    typer.Option("--min-speed", metavar="R", help="At least R of the stock preset's predicted tokens per second."),
]
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
        "--min-expert-tokens",
        min=0,
        help="Go on until each expert has seen so many; each gets as many of its layer's mean beside them.",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", min=64, help="But to no more tokens than these (default: 4 times --tokens)."),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="For the statistics and for rounding, beside the weights: in more passes where not all fits (default: "
        "2.5G for statistics, or what one matrix takes; what one tensor takes for rounding).",
    ),
]
ChatTemplate = Annotated[
    Path | None, typer.Option("--chat-template", metavar="FILE", help="A Jinja template instead of the model's own.")
]
ImatrixFiles = Annotated[
    list[Path] | None,
    typer.Option("--imatrix", metavar="FILE", help="Use this imatrix (.gguf, .dat); several are merged."),
]
ProbeTokens = Annotated[
    int, typer.Option("--probe-tokens", min=32, help="At most so many tokens of the probe split for each tensor.")
]
ProbeError = Annotated[
    float,
    typer.Option(
        "--probe-error",
        min=0.0,
        help="Probe until uncertain slopes are expected to cost less than this part of the KLD.",
    ),
]
ProbeGroup = Annotated[
    str,
    typer.Option(
        "--probe-group",
        metavar="GROUP",
        help="For large models: probe together what is of one kind in neighbouring layers: kind:4 (four layers), "
        "kind:depth (an eighth of them), kind (all).",
    ),
]
ProbeDevices = Annotated[
    str,
    typer.Option(
        "--probe-devices",
        metavar="LIST",
        help="Spread the probes over these: CUDA0,CUDA1 or rpc:HOST:PORT (trusted networks only: RPC is not secured).",
    ),
]
Candidates = Annotated[
    int,
    typer.Option("--candidates", min=0, help="Schemes to measure before choosing one; 0 trusts the prices unmeasured."),
]
Rounds = Annotated[
    int, typer.Option("--rounds", min=0, help="How often at most to refit the prices to the measured schemes.")
]
EvalTokens = Annotated[int, typer.Option("--eval-tokens", min=64, help="Tokens of the test split for the proof.")]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


NoFeedback = Annotated[
    bool, typer.Option("--no-feedback", help="Round plainly, as llama-quantize does, without error feedback.")
]


def size_bytes(text: str) -> int:
    """Bytes that ``text`` means: ``250M``, ``250 MB``, ``1.5GiB``, ``92000000B``; cut off. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[KMGT]I?)B?", text.strip().upper(), re.ASCII)
    if match is None:
        raise UsageError(f"{text!r} is no size", fix="write it as 250MB, 1.5GB, 240MiB or in bytes")
    # Exactly: a float would lose bytes of large sizes.
    return int(Decimal(match[1]) * _UNITS[match[2]])


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
    memory: Memory = None,
    chat_template: ChatTemplate = None,
    imatrix: ImatrixFiles = None,
) -> Settings:
    """How to measure, from the options; without them the defaults."""
    from dynrun.calibration.stage import ImatrixSettings
    from dynrun.config import load_config
    from dynrun.stages import Settings

    return Settings(
        calibration=calibration,
        chat_template=chat_template,
        imatrix_files=tuple(imatrix or ()),
        imatrix=ImatrixSettings(
            tokens, ctx, min_expert_tokens, max_tokens, memory=size_bytes(memory) if memory else None
        ),
        config=load_config(),
    )


def menu(types: Types = "all") -> tuple[str, ...]:
    """The types to choose from. Raises UsageError."""
    from dynrun.gguf.tensor_types import parse_menu

    return parse_menu(types)


def constraints(
    pin: Pins = None,
    minimum: Minima = None,
    maximum: Maxima = None,
    speed_table: SpeedTablePath = None,
    min_speed: MinSpeed = None,
) -> Constraints:
    """What is wanted of certain tensors and of the speed. Raises UsageError for rules that are none."""
    from dynrun.allocation.constraints import Constraints, parse_rule
    from dynrun.allocation.speed import read_speed_table

    rules = [parse_rule("pin", text) for text in pin or ()]
    rules += [parse_rule("min", text) for text in minimum or ()]
    rules += [parse_rule("max", text) for text in maximum or ()]
    return Constraints(tuple(rules), read_speed_table(speed_table) if speed_table else None, min_speed)


def calibrated(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the options of calibration in the place of its parameter ``settings``."""
    return with_options(command, {"": settings})


def allocated(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the options of calibration, of the menu and of constraints in the place of ``settings``."""
    return with_options(command, {"": settings, "menu": menu, "constraints": constraints})


def with_options(command: Callable[..., None], builders: Mapping[str, Callable[..., Any]]) -> Callable[..., None]:
    """``command`` with the parameters of all ``builders`` in the place of ``settings``, a dataclass.

    The builder "" makes the settings, each other one the field of its name.
    """
    known = {"Settings": Any, "Constraints": Any}
    shared = {field: inspect.signature(b, eval_str=True, locals=known).parameters for field, b in builders.items()}
    own = inspect.signature(command).parameters.values()
    # Annotations are strings; that of `settings` is known to type checkers only.
    parameters = [
        parameter.replace(annotation=eval(parameter.annotation, command.__globals__))  # noqa: S307
        for parameter in own
        if parameter.name != "settings"
    ]
    # Before --json, which all commands end with.
    parameters[-1:-1] = [parameter for group in shared.values() for parameter in group.values()]

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        made = {field: builders[field](**{name: values.pop(name) for name in shared[field]}) for field in builders}
        command(settings=replace(made.pop(""), **made), **values)

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def search(n_candidates: int, rounds: int) -> SearchSettings:
    """The search's settings out of the options."""
    from dynrun.allocation.search import SearchSettings

    return SearchSettings(n_candidates=n_candidates, rounds=rounds)


def probes(n_tokens: int, error: float = 0.01, group: str = "", devices: str = "") -> ProbeSettings:
    """The probes' settings out of the options. Raises UsageError for an unknown group."""
    from dynrun.sensitivity.stage import ProbeSettings
    from dynrun.sensitivity.units import check_group

    names = tuple(name.strip() for name in devices.split(",") if name.strip())
    return ProbeSettings(n_tokens=n_tokens, error=error, group=check_group(group), devices=names)


def choosing(settings: Settings, probes: ProbeSettings, search: SearchSettings, no_feedback: bool) -> Settings:
    """``settings`` with how types are chosen."""
    feedback = None if no_feedback else settings.feedback
    return replace(settings, probes=probes, search=search, feedback=feedback)
