"""The conversion as a stage: found by what it reads, whole or absent, compared with its source before it is named.

Takes a folder of safetensors, gives the GGUF in the precision of the source. The converter sees a folder of links to
the files that :func:`read_folder` looked at, and nothing else of the model's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrun.artifacts import Outcome, StageFolder, key_of, run_stage, sha256_file, write_json
from dynrun.convert.compare import compare
from dynrun.convert.environment import ConversionEnvironment, Say, conversion_environment, lock_sha256
from dynrun.convert.failures import explain
from dynrun.convert.folder import Source, read_folder
from dynrun.convert.plan import ConversionPlan, check_disk, plan_conversion
from dynrun.errors import DynrunError, UsageError
from dynrun.llamacpp.process import new_log, stream
from dynrun.llamacpp.source import read_pin
from dynrun.paths import models_dir, repository_root

PARTS = ("model", "mmproj", "mtp")
_FLAGS: Mapping[str, tuple[str, ...]] = {"model": (), "mmproj": ("--mmproj",), "mtp": ("--mtp",)}
_SCRIPT = Path(__file__).parent / "run_converter.py"
_WORK = "work.part"
# Counts up when the same source would give other bytes.
_REVISION = 1
_WRITING = re.compile(r"Writing:\s+(\d+)%")

Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Wishes:
    """``trust_code``: run the model's own code, or convert without it; None refuses a model that names any.
    ``part``: the language model, its projector for images (mmproj), or its MTP head alone."""

    trust_code: bool | None = None
    part: str = "model"


@dataclass(frozen=True)
class Converted:
    """``findings``: what of the source is not accounted for in the result; none mostly."""

    path: Path
    source: Source
    plan: ConversionPlan
    outcome: Outcome

    @property
    def findings(self) -> list[str]:
        return list(self.outcome.result["findings"])


def convert(
    folder: Path, wishes: Wishes, say: Say, progress: Progress = lambda _d, _t, _n: None, *, more_bytes: int = 0
) -> Converted:
    """The reference of the model in ``folder``, converted or found.

    ``more_bytes`` must fit on the disk beside it. Raises what :func:`read_folder` raises; UsageError where the model
    names code of its own and nobody said what to do with it; DoesNotFitError; DynrunError with the converter's reason.
    """
    source = read_folder(folder)
    part = checked_part(wishes.part)
    found = known_conversion(source, wishes)
    plan = plan_conversion(source, part)
    check_code(source, wishes, known=found.complete)

    def work(stage: StageFolder) -> Mapping[str, Any]:
        check_disk(plan, stage.path, more_bytes)
        say(
            f"converting {source.folder} to {plan.type_name}: {plan.result_bytes:,} bytes on the disk, "
            f"up to {plan.memory_bytes / 1e9:.1f} GB of memory"
        )
        return _convert(source, plan, wishes, stage, conversion_environment(say), progress)

    outcome = run_stage(found, work)
    return Converted(found / outcome.result["file"], source, plan, outcome)


def plan_of(folder: Path, wishes: Wishes) -> dict[str, Any]:
    """What converting ``folder`` would take, as plain data. Raises what :func:`convert` raises before it starts."""
    source, part = read_folder(folder), checked_part(wishes.part)
    known = known_conversion(source, wishes).complete
    check_code(source, wishes, known=known)
    plan = plan_conversion(source, part)
    return {
        "architecture": source.architecture,
        "type": plan.type_name,
        "part": part,
        "tensors": len(source.tensors),
        "result_bytes": plan.result_bytes,
        "memory_bytes": plan.memory_bytes,
        "cached": known,
    }


def checked_part(part: str) -> str:
    """``part``. Raises UsageError for one that there is not."""
    if part not in PARTS:
        raise UsageError(f"no part {part!r}", fix=f"one of {', '.join(PARTS)}")
    return part


def known_conversion(source: Source, wishes: Wishes) -> StageFolder:
    """Where the conversion lies, made or not; with nothing said of code one that is there, however it was made."""
    if wishes.trust_code is not None:
        return _folder(source, wishes.part, trusted=wishes.trust_code)
    plain, trusted = (_folder(source, wishes.part, trusted=trusted) for trusted in (False, True))
    return trusted if trusted.complete and not plain.complete else plain


def _folder(source: Source, part: str, *, trusted: bool) -> StageFolder:
    kept = {name: sha256_file(path) for name, path in source.files.items() if _is_shown(name, trusted)}
    inputs = {
        "files": kept,
        # The converter writes it into the metadata.
        "name": source.name,
        "part": part,
        "trusted": trusted and bool(source.code),
        "llama_cpp": read_pin().llama_cpp_commit,
        "environment": lock_sha256(),
        "revision": _REVISION,
    }
    key = key_of(inputs)
    return StageFolder("convert", key, models_dir() / "converted" / key, inputs)


def _is_shown(name: str, trusted: bool) -> bool:
    return trusted or not name.endswith(".py")


def check_code(source: Source, wishes: Wishes, *, known: bool = False) -> None:
    """Raise UsageError where the model names code of its own, unless it was said what to do, or nothing will be run."""
    if source.code and wishes.trust_code is None and not known:
        raise UsageError(
            f"{source.folder / source.code[0].partition(':')[0]} names code of the model's own "
            f"({source.code[0].partition(': ')[2]}); nothing was run",
            fix="--no-trust-remote-code converts without it, --trust-remote-code runs it",
        )


def _convert(
    source: Source,
    plan: ConversionPlan,
    wishes: Wishes,
    stage: StageFolder,
    environment: ConversionEnvironment,
    progress: Progress,
) -> dict[str, Any]:
    work = stage / _WORK
    shutil.rmtree(work, ignore_errors=True)
    try:
        shown = show_files(source, work / "model" / source.name, trusted=bool(wishes.trust_code))
        made = work / "out.gguf"
        _run(source, shown, made, plan, wishes, environment, progress)
        # The converter puts a prefix before the name of a part.
        written = next((path for path in sorted(work.glob("*.gguf"))), made)
        findings = compare(written, source, wishes.part)
        name = _file_name(source, plan, wishes.part)
        with written.open("r+b") as stream_:
            os.fsync(stream_.fileno())
        written.replace(stage / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {"file": name, "sha256": sha256_file(stage / name), "findings": findings}


def _file_name(source: Source, plan: ConversionPlan, part: str) -> str:
    prefix = "" if part == "model" else f"{part}-"
    return f"{prefix}{source.name}-{plan.type_name}.gguf"


def show_files(source: Source, folder: Path, *, trusted: bool) -> Path:
    """A folder of links to the files that were looked at, under the model's own name. Without trust no code is in it,
    and no configuration that names some."""
    folder.mkdir(parents=True)
    for name, path in source.files.items():
        if not _is_shown(name, trusted):
            continue
        if not trusted and any(named.partition(":")[0] == name for named in source.code):
            write_json(folder / name, _without_code(json.loads(path.read_text(encoding="utf-8"))))
        else:
            (folder / name).symlink_to(path)
    return folder


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_code(one) for key, one in value.items() if key != "auto_map"}
    return [_without_code(one) for one in value] if isinstance(value, list) else value


def _run(
    source: Source,
    shown: Path,
    made: Path,
    plan: ConversionPlan,
    wishes: Wishes,
    environment: ConversionEnvironment,
    progress: Progress,
) -> None:
    vendor = repository_root() / "vendor" / "llama.cpp"
    if not (vendor / "convert_hf_to_gguf.py").is_file():
        raise DynrunError(f"{vendor} has no converter", fix="run python3 build.py")
    policy = "trust" if wishes.trust_code else "refuse"
    home = made.parent / "home"
    home.mkdir()
    arguments: list[str | Path] = ["--outfile", made, "--outtype", plan.out_type, *_FLAGS[wishes.part], shown]

    def watch(line: str) -> None:
        if match := _WRITING.match(line):
            progress(float(match[1]), 100.0, "% written")

    log = new_log("convert")
    argv = environment.command(_SCRIPT, vendor, policy, *arguments)
    done = stream(argv, watch, log=log, env=environment.variables(home), cwd=home, check=False)
    if done.exit_code or not any(made.parent.glob("*.gguf")):
        raise explain(done, source, wishes.part)
