"""Hand a made file to other programs on this machine: Ollama, LM Studio.

Takes a GGUF, gives what those programs look for. Files are linked where the disk allows it, else copied; nothing of
theirs is changed but what is written here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrun.artifacts import link_or_copy, write_text
from dynrun.errors import MALFORMED, DynrunError, UsageError
from dynrun.gguf.header import read_header
from dynrun.gguf.shards import read_shards
from dynrun.llamacpp.process import capture, new_log

# general.sampling.* of GGUF (the maker's recommendations) → Ollama's parameters (docs/modelfile of ollama).
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repeat_penalty",
    "penalty_last_n": "repeat_last_n",
}
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,79}", re.ASCII)


@dataclass(frozen=True)
class Exported:
    """``files``: what the other program reads; ``command``: how it is started; ``done``: whether it knows the model."""

    program: str
    name: str
    files: tuple[Path, ...]
    command: str
    done: bool


# -- Ollama ------------------------------------------------------------------------------------------------------------


def export_ollama(path: Path, name: str, folder: Path, *, run: bool = True) -> Exported:
    """Write ``folder``/Modelfile for the GGUF at ``path`` and, where Ollama is installed and ``run``, create the model.

    Raises DynrunError with Ollama's own reason where it fails.
    """
    name = _checked(name.lower())
    shards = [header.path for header in read_shards(path)]
    modelfile = folder / "Modelfile"
    write_text(modelfile, modelfile_of(shards, read_header(path).metadata))
    program = shutil.which("ollama") if run else None
    if program is not None:
        done = capture([program, "create", name, "-f", modelfile], log=new_log("ollama"), check=False)
        if done.exit_code:
            said = next((line.strip() for line in reversed(done.stderr_tail) if line.strip()), "no reason given")
            raise DynrunError(
                f"ollama could not take {path}: {said[:200]}",
                fix="start it with `ollama serve`, and run the same command again",
                log=done.log,
            )
        return Exported("ollama", name, (modelfile,), f"ollama run {name}", True)
    return Exported("ollama", name, (modelfile,), f"ollama create {name} -f {modelfile}", False)


def modelfile_of(shards: list[Path], metadata: Mapping[str, Any]) -> str:
    """The Modelfile: where the GGUF lies, and what its metadata recommends.

    Ollama finds the template by the GGUF's own chat template, and the stop words in its vocabulary. All shards of a
    model are named by one pattern.
    """
    source = str(shards[0].resolve())
    if len(shards) > 1:
        source = re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", r"-*\1", source)
    lines = [f"FROM {source}", *(f"PARAMETER {name} {value}" for name, value in _parameters(metadata))]
    return "\n".join(lines) + "\n"


def _parameters(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, theirs in _SAMPLING.items():
        value = metadata.get(f"general.sampling.{key}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield theirs, f"{value:.6g}"


# -- LM Studio ---------------------------------------------------------------------------------------------------------


def export_lmstudio(path: Path, publisher: str, name: str, models: Path | None = None) -> Exported:
    """Put the GGUF at ``path`` (all its shards, and an mmproj beside it) where LM Studio looks: models/publisher/name.

    Raises DynrunError where LM Studio's folder of models is not there and none is named.
    """
    folder = (models or lmstudio_models()) / _checked(publisher) / _checked(name)
    sources = [header.path for header in read_shards(path)]
    sources += [beside for beside in path.parent.glob("*mmproj*.gguf") if beside not in sources]
    for source in sources:
        link_or_copy(source, folder / source.name)
    return Exported("lmstudio", f"{publisher}/{name}", tuple(folder / s.name for s in sources), "lms load", True)


def lmstudio_models() -> Path:
    """LM Studio's folder of models: the one of its settings, else the default of its home."""
    home = Path.home() / ".lmstudio"
    pointer = Path.home() / ".lmstudio-home-pointer"
    if pointer.is_file():
        home = Path(pointer.read_text(encoding="utf-8").strip())
    if not home.is_dir():
        raise DynrunError(
            f"LM Studio has no folder at {home}", fix="start it once, or name its folder of models: --models DIR"
        )
    try:
        chosen = json.loads((home / "settings.json").read_text(encoding="utf-8"))["downloadsFolder"]
        return Path(os.path.expandvars(str(chosen))).expanduser()
    except (OSError, *MALFORMED):
        return home / "models"


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name) or ".." in name:
        raise UsageError(f"{name!r} is no name for a model there", fix="use letters, digits, points and dashes: --name")
    return name
