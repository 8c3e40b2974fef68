"""`dynrun convert`: from a folder of safetensors, or a repository of them, to the reference GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options
from dynrun.cli.output import Ticker, emit, megabytes, say
from dynrun.errors import UsageError

if TYPE_CHECKING:
    from dynrun.convert.logits import Agreement
    from dynrun.convert.stage import Converted

Folder = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder with safetensors and config.json, or owner/repo of the Hub.")
]
TrustCode = Annotated[
    bool | None,
    typer.Option(
        "--trust-remote-code/--no-trust-remote-code",
        help="Run the model's own Python code, or convert without it (default: refuse a model that names any).",
    ),
]
Check = Annotated[
    bool, typer.Option("--check", help="Compare 64 tokens' logits with transformers' (the model in float32 in memory).")
]
Part = Annotated[str, typer.Option("--part", help="model; mmproj (images, sound); mtp (the MTP head alone).")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Put the GGUF there too.")]


def convert(
    model: Folder,
    out: Out = None,
    part: Part = "model",
    check: Check = False,
    trust_remote_code: TrustCode = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look at the folder, say what it takes.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Convert safetensors to a GGUF of the same precision, by llama.cpp's converter in an environment of its own.

    `make` does this by itself; converted once, it is found. Example: dynrun convert ./Qwen3-4B --check
    """
    from dynrun.artifacts import link_or_copy
    from dynrun.convert.fetch import model_folder
    from dynrun.convert.stage import Wishes, plan_of
    from dynrun.convert.stage import convert as convert_model

    wishes = Wishes(trust_remote_code, part)
    folder = model_folder(model, say)
    if dry_run:
        plan = plan_of(folder, wishes)
        emit(as_json, plan, lambda: _show_plan(plan))
        return
    converted = convert_model(folder, wishes, say, Ticker("  convert"))
    agreement = checked(converted) if check else None
    if out is not None:
        link_or_copy(converted.path, out)
    data = to_json(converted, agreement, out or converted.path)
    emit(as_json, data, lambda: _show(converted, agreement, out or converted.path))


def prepare(model: str, trust_remote_code: bool | None, *, check: bool, n_files: int = 1) -> None:
    """Convert ``model`` for `make` of ``n_files``, where it is safetensors: it is found then.

    Raises UsageError where the wishes are for what is no such thing.
    """
    from dynrun.convert.fetch import model_folder
    from dynrun.convert.folder import is_model_folder, read_folder
    from dynrun.convert.plan import following_bytes
    from dynrun.convert.stage import Wishes
    from dynrun.convert.stage import convert as convert_model

    path = Path(model).expanduser()
    wished = check or trust_remote_code is not None
    if not is_model_folder(path):
        if not wished:
            return
        if path.exists() or "/" not in model:
            raise UsageError(f"{model} is not converted", fix="--check and --trust-remote-code are for safetensors")
    source = model_folder(model, say)
    wishes, more = Wishes(trust_remote_code), following_bytes(read_folder(source), n_files)
    converted = convert_model(source, wishes, say, Ticker("  convert"), more_bytes=more)
    for finding in converted.findings:
        say(f"note: {finding}")
    if check:
        checked(converted)


def checked(converted: Converted) -> Agreement:
    """`--check`, with what it found on stderr."""
    from dynrun.config import load_config
    from dynrun.convert.logits import check_logits

    say("check: the logits of transformers and of llama.cpp")
    return check_logits(converted, load_config(), say)


def to_json(converted: Converted, agreement: Agreement | None, path: Path) -> dict[str, Any]:
    """What `--json` gives."""
    return {
        "path": str(path),
        "size_bytes": path.stat().st_size,
        "sha256": converted.outcome.result["sha256"],
        "type": converted.plan.type_name,
        "architecture": converted.source.architecture,
        "planned": {"result_bytes": converted.plan.result_bytes, "memory_bytes": converted.plan.memory_bytes},
        "findings": converted.findings,
        "check": None if agreement is None else {"kld": agreement.kld, "same_top_p": agreement.same_top},
        "cached": converted.outcome.cached,
        "elapsed_s": round(converted.outcome.elapsed_s, 2),
    }


def _show(converted: Converted, agreement: Agreement | None, path: Path) -> None:
    print(f"{converted.plan.type_name}  {megabytes(path.stat().st_size)}  {path}")
    for finding in converted.findings:
        print(f"note: {finding}")
    if agreement is not None:
        print(
            f"against transformers in float32, {agreement.n_tokens} tokens: mean KLD {agreement.kld:.1e}, "
            f"same top p {agreement.same_top:.1%}; {agreement.n_text_tokens} tokens equal"
        )


def _show_plan(plan: dict[str, Any]) -> None:
    state = "found" if plan["cached"] else "to do"
    print(f"{state}: {plan['architecture']} to {plan['type']}, {plan['tensors']} tensors")
    print(f"disk    {megabytes(plan['result_bytes'])}")
    print(f"memory  {megabytes(plan['memory_bytes'])}")
