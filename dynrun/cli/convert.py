"""`dynrun convert`: from a folder of safetensors, or a repository of them, to the reference GGUF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options
from dynrun.cli.output import Ticker, emit, megabytes, say
from dynrun.errors import UsageError
from dynrun.report.text import visible

if TYPE_CHECKING:
    from dynrun.convert.logits import Agreement
    from dynrun.convert.stage import Converted
    from dynrun.lint.finding import Finding
    from dynrun.make import PlannedStage

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
    findings, agreement = linted(converted), checked(converted) if check else None
    if out is not None:
        link_or_copy(converted.path, out)
    data = to_json(converted, findings, agreement, out or converted.path)
    emit(as_json, data, lambda: _show(converted, findings, agreement, out or converted.path))


def prepare(model: str, trust_remote_code: bool | None, *, check: bool, n_files: int = 1) -> str:
    """What `make` of ``n_files`` shall take for ``model``: of safetensors their folder, converted.

    Raises UsageError where the wishes are for what is no such thing.
    """
    from dynrun.convert.folder import read_folder
    from dynrun.convert.plan import following_bytes
    from dynrun.convert.stage import Wishes
    from dynrun.convert.stage import convert as convert_model

    source = named_source(model, wished=check or trust_remote_code is not None)
    if source is None or not source.is_dir():
        return str(source or model)
    wishes, more = Wishes(trust_remote_code), following_bytes(read_folder(source), n_files)
    converted = convert_model(source, wishes, say, Ticker("  convert"), more_bytes=more)
    for note in _notes(converted, linted(converted)):
        say(note)
    if check:
        checked(converted)
    return str(source)


def named_source(model: str, *, wished: bool) -> Path | None:
    """The folder of safetensors that ``model`` names, fetched; or the repository's own GGUF in its place, unless
    something is ``wished`` of a conversion; None for anything else."""
    from dynrun.convert.fetch import model_folder, reference_source
    from dynrun.convert.folder import is_model_folder

    path = Path(model).expanduser()
    if is_model_folder(path):
        return model_folder(model, say)
    if not wished:
        return reference_source(model, say)
    if path.exists() or "/" not in model:
        raise UsageError(f"{model} is not converted", fix="--check and --trust-remote-code are for safetensors")
    return model_folder(model, say)


def unconverted(model: str, trust_remote_code: bool | None) -> list[PlannedStage]:
    """What `make --dry-run` shows of what must come here or be converted first; empty where all that is done."""
    from dynrun.convert.fetch import missing_files
    from dynrun.convert.folder import is_model_folder
    from dynrun.convert.stage import Wishes, plan_of
    from dynrun.hub.files import amount
    from dynrun.make import PlannedStage

    folder = Path(model).expanduser()
    if not is_model_folder(folder):
        if not (files := missing_files(model)):
            return []
        fetched = f"{len(files)} files of {model}, {amount(sum(file.size for file in files))}"
        return [PlannedStage("fetch", False, f"{fetched}; the rest is known once they are here")]
    plan = plan_of(folder, Wishes(trust_remote_code))
    if plan["cached"]:
        return []
    takes = f"{plan['result_bytes']:,} bytes on the disk, up to {amount(plan['memory_bytes'])} of memory"
    return [PlannedStage("convert", False, f"to {plan['type']}, {takes}; the rest is known afterwards")]


def linted(converted: Converted) -> list[Finding]:
    """What `dynrun lint` says of a model beside its config.json, errors first."""
    from dynrun.convert.folder import CONFIG
    from dynrun.lint.source import lint_file

    if converted.path.name.startswith(("mmproj-", "mtp-")):
        return []
    return list(lint_file(converted.path, converted.source.files[CONFIG]).findings)


def _notes(converted: Converted, findings: Sequence[Finding]) -> list[str]:
    """A line for each thing that people should know of a conversion."""
    notes = [f"note: {finding}" for finding in converted.findings]
    return notes + [
        f"{finding.severity}: {finding.id}: {visible(finding.key)} is {finding.found}, expected {finding.expected}"
        for finding in findings
        if finding.severity != "info"
    ]


def checked(converted: Converted) -> Agreement:
    """`--check`, with what it found on stderr."""
    from dynrun.config import load_config
    from dynrun.convert.logits import check_logits

    say("check: the logits of transformers and of llama.cpp")
    return check_logits(converted, load_config(), say)


def to_json(
    converted: Converted, findings: Sequence[Finding], agreement: Agreement | None, path: Path
) -> dict[str, Any]:
    """What `--json` gives."""
    return {
        "path": str(path),
        "size_bytes": path.stat().st_size,
        "sha256": converted.outcome.result["sha256"],
        "type": converted.plan.type_name,
        "architecture": converted.source.architecture,
        "planned": {"result_bytes": converted.plan.result_bytes, "memory_bytes": converted.plan.memory_bytes},
        "findings": converted.findings,
        "lint": [asdict(finding) for finding in findings],
        "check": None if agreement is None else {"kld": agreement.kld, "same_top_p": agreement.same_top},
        "cached": converted.outcome.cached,
        "elapsed_s": round(converted.outcome.elapsed_s, 2),
    }


def _show(converted: Converted, findings: Sequence[Finding], agreement: Agreement | None, path: Path) -> None:
    print(f"{converted.plan.type_name}  {megabytes(path.stat().st_size)}  {path}")
    for note in _notes(converted, findings):
        print(note)
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
