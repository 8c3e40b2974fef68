"""Resolve MODEL, as every command takes it, to a file.

A path; a folder of safetensors, which is converted; a built-in name (``demo``, ``demo-moe``), which means its F16
reference; ``name:LABEL``, a file that `make` made of a built-in model; ``owner/repo[:QUANT]``, a model of the Hub that
was pulled.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from dynrun.artifacts import freed_bytes, sha256_file, translated_os_errors
from dynrun.demo.builtin import BUILTIN, builtin_path, ensure_builtin
from dynrun.errors import DynrunError, NotFoundError, UsageError
from dynrun.gguf.header import Header, read_header
from dynrun.gguf.quant_label import label_of
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.tensor_types import FULL_PRECISION
from dynrun.hub.local import find_local, local_models
from dynrun.hub.resolve import parse_name
from dynrun.paths import models_dir


@dataclass(frozen=True)
class Model:
    """A model on this machine. ``name`` is what the user called it, or the file's stem.

    ``released``: converted from what its makers released, in whatever precision that is.
    """

    name: str
    path: Path
    released: bool = False


@dataclass(frozen=True)
class Reference:
    """The full-precision model that everything is measured against.

    ``quantized``: the label of the file that it was unpacked from, where nothing better was given: what is measured is
    the divergence from that file.
    """

    name: str
    header: Header
    sha256: str
    quantized: str = ""

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def provenance(self) -> dict[str, str]:
        """What the metadata of a file made of it says: of a quantized reference, that it was one."""
        return {"dynrun.reference.quantized": self.quantized} if self.quantized else {}

    @property
    def warning(self) -> str:
        """What people must know of numbers measured against it; "" mostly."""
        if not self.quantized:
            return ""
        return (
            f"the reference is itself quantized ({self.quantized}): divergences are from that file, not from the model"
        )


@dataclass(frozen=True)
class Listed:
    """A line of `dynrun ls`."""

    name: str
    path: Path
    size_bytes: int
    architecture: str
    quant: str


def resolve(model: str) -> Model:
    """The file that MODEL means, made first where it is built in.

    Raises NotFoundError, naming the nearest known name, or the command that gets it from the Hub; UsageError where
    several quants of a model of the Hub are here and none is named.
    """
    path = Path(model).expanduser()
    if path.is_file():
        # Not resolved: in the Hub's cache the name of a file is its link's.
        return Model(path.stem, path.absolute())
    if path.is_dir() and model not in BUILTIN:
        return _converted(path)
    if model in BUILTIN:
        return Model(model, ensure_builtin(model))
    name, colon, label = model.partition(":")
    if colon and (made := made_path(name, label)).is_file():
        return Model(model, made)
    if (own := dict(_own_models()).get(model)) is not None:
        return Model(model, own)
    if (model.endswith(".gguf") and not colon) or path.is_absolute() or model.startswith("."):
        raise NotFoundError(f"{model} does not exist", fix="check the path")
    if "/" in model:
        local = find_local(parse_name(model))
        return Model(local.stem, local.path)
    near = get_close_matches(model, [*BUILTIN, *(listed.name for listed in list_models())], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"give a path to a GGUF, or one of {', '.join(BUILTIN)}"
    raise NotFoundError(f"no model {model!r} on this machine", fix=hint)


def _converted(folder: Path) -> Model:
    """The reference of a folder of safetensors, converted first. Raises NotFoundError where it holds no model."""
    from dynrun.convert.folder import is_model_folder
    from dynrun.convert.stage import Wishes, convert

    if not is_model_folder(folder):
        raise NotFoundError(f"{folder} holds no model", fix="give a GGUF, or a folder of safetensors with config.json")
    converted = convert(folder, Wishes(), _say)
    return Model(converted.source.name, converted.path, released=True)


def _say(text: str) -> None:
    """A line of narration, of what takes long where nobody expects it."""
    print(text, file=sys.stderr, flush=True)


def _reference_model(model: str) -> Model:
    """What MODEL means where full precision is wanted: of a repository the GGUF that has it, or its safetensors."""
    from dynrun.convert.fetch import reference_source

    source = reference_source(model, _say)
    if source is None:
        return resolve(model)
    return _converted(source) if source.is_dir() else Model(source.stem, source)


def open_reference(model: str) -> Reference:
    """MODEL as a reference to quantize from; a quantized one is unpacked, and the reference says so.

    Shards are joined. Raises UsageError where it is no language model.
    """
    from dynrun.llamacpp.join import joined

    found = _reference_model(model)
    if (whole := joined(found.path, _say)) != found.path:
        found = replace(found, name=whole.stem, path=whole)
    header = read_header(found.path)
    if not header.architecture or header.metadata.get("general.type", "model") != "model":
        raise UsageError(f"{found.path} holds no language model", fix="give a GGUF of a model")
    if all(tensor.type in FULL_PRECISION for tensor in quantizable(header).values()):
        return Reference(found.name, header, sha256_file(found.path))
    from dynrun.convert.dequantize import dequantized

    unpacked = dequantized(found.path, _say)
    quantized = "" if found.released else label_of(header)
    return Reference(found.name, read_header(unpacked), sha256_file(unpacked), quantized)


def made_path(name: str, label: str) -> Path:
    """Where `make` puts its file for model ``name`` and quant ``label``."""
    return models_dir() / "made" / f"{name}-{label}.gguf"


def list_models() -> list[Listed]:
    """The built-in models that have been made, every file that `make` made, and what was pulled from the Hub."""
    listed = []
    for name, path in _own_models():
        try:
            header = read_header(path)
        except DynrunError:
            continue
        listed.append(_listed(name, path, header))
    for local in local_models():
        try:
            architecture = read_header(local.path).architecture
        except DynrunError:
            continue
        listed.append(Listed(local.name, local.path, local.variant.size, architecture, local.variant.label))
    return listed


def _own_models() -> list[tuple[str, Path]]:
    """Names and files of dynrun's own cache."""
    found = [(name, builtin_path(name)) for name in BUILTIN if builtin_path(name).is_file()]
    for path in sorted((models_dir() / "made").glob("*.gguf")):
        base = next((name for name in sorted(BUILTIN, reverse=True) if path.stem.startswith(f"{name}-")), None)
        found.append((f"{base}:{path.stem.removeprefix(f'{base}-')}" if base else path.stem, path))
    return found


@dataclass(frozen=True)
class Kept:
    """What dynrun's own cache keeps of a model: its file, and of a made one the scheme and the report."""

    paths: tuple[Path, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(map(str, self.paths))

    @property
    def freed_bytes(self) -> int:
        """Bytes that are free when they are gone."""
        return freed_bytes(self.paths)

    def execute(self) -> None:
        """Take it away, the model first."""
        for path in self.paths:
            with translated_os_errors(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def kept(model: str) -> Kept | None:
    """What of MODEL could be removed, if it is a built-in or a made one."""
    for name, path in _own_models():
        if model == name:
            beside = (path.with_suffix(".scheme.toml"), path.with_suffix(".report"))
            return Kept((path, *(other for other in beside if other.exists())))
    return None


def _listed(name: str, path: Path, header: Header) -> Listed:
    return Listed(name, path, header.file_bytes, header.architecture, label_of(header))
