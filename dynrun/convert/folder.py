"""Look at a folder of a model before anything of it is used: what may be converted, and what is refused.

Takes a folder, gives a :class:`Source` whose files have been looked at, each by name. Only these are ever shown to the
converter. Executes nothing, unpickles nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dynrun.convert.stored import StoredTensor, read_stored
from dynrun.errors import NotFoundError, UsageError

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_CODE = ".py"
# Pickles may hold code: they are never read, and without safetensors there is nothing to convert.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# What a conversion reads beside the weights; all that is fetched of a repository (`wanted_of`).
_TEXT_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_TEXT_NAMES = ("README.md",)
_MAX_TEXT = 512 << 20
_MAX_CONFIG = 16 << 20
# Sizes in a config, none of which can be larger than what the weights have.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_nextn_predict_layers")
_WIDTHS = (
    *("hidden_size", "n_embd", "d_model", "intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner"),
    *("vocab_size", "num_attention_heads", "num_key_value_heads", "n_head", "head_dim", "q_lora_rank", "kv_lora_rank"),
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "n_shared_experts"),
)
# A config may be of a padded vocabulary or of heads that the weights fold.
_SLACK = 8
_NUMBERED = re.compile(r"model-[0-9]{5}-of-([0-9]{5})\.safetensors")


@dataclass(frozen=True)
class Source:
    """A folder that may be converted. ``files``: name → the real file; ``code``: what of the model's own code its
    configuration names, as ``config.json: evil.EvilConfig``."""

    folder: Path
    name: str
    files: Mapping[str, Path]
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    code: tuple[str, ...]

    @property
    def architecture(self) -> str:
        """The class that the configuration names, "" for none."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def is_model_folder(folder: Path) -> bool:
    """Whether ``folder`` is meant as one of a model's weights; not whether it is sound."""
    return folder.is_dir() and any(
        path.name == CONFIG or path.suffix in (".safetensors", *_PICKLES) for path in folder.iterdir()
    )


def wanted_of(names: Iterator[str] | list[str]) -> list[str]:
    """Of a repository's files those that a conversion reads: no code, no pickles, no consolidated twins."""
    found = [name for name in names if "/" not in name]
    weights = [name for name in found if name.endswith(".safetensors")]
    if any(name.startswith("model") for name in weights):
        weights = [name for name in weights if name.startswith("model")]
    return [name for name in found if name in weights or _is_text(name)]


def _is_text(name: str) -> bool:
    return name in _TEXT_NAMES or PurePosixPath(name).suffix in _TEXT_SUFFIXES


def read_folder(folder: Path) -> Source:
    """Look at all that a conversion of ``folder`` would read.

    Raises UsageError, naming the file, for what must not be used: links that lead out, names with a path, pickles,
    sizes that the weights do not bear out; DynrunError for a file that is not whole; NotFoundError for a missing one.
    """
    folder = folder.resolve()
    files = {path.name: _real(path, folder) for path in sorted(folder.iterdir()) if _is_read(path)}
    if CONFIG not in files:
        raise NotFoundError(f"{folder} has no {CONFIG}", fix="give the folder of a model as its repository has it")
    config = _json(files[CONFIG], _MAX_CONFIG)
    shards = _shards(folder, files)
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        stored = read_stored(files[shard])
        if twice := tensors.keys() & stored.keys():
            raise UsageError(f"{folder / shard} has {min(twice)!r:.80}, which a shard before it has too")
        tensors |= stored
    _check_index(folder, files, tensors)
    _check_sizes(files[CONFIG], config, tensors)
    kept = {name: path for name, path in files.items() if name in shards or not name.endswith(".safetensors")}
    return Source(folder, folder_name(folder), kept, config, tensors, tuple(_code(kept)))


def folder_name(folder: Path) -> str:
    """The model's name: the folder's own, the repository's where the folder is a snapshot of the Hub's cache."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


def _is_read(path: Path) -> bool:
    return path.suffix in (".safetensors", _CODE) or _is_text(path.name)


def _real(path: Path, folder: Path) -> Path:
    """The file behind ``path``. A link may lead within the folder, or, as in the Hub's cache, to its own blobs."""
    real = path.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    if not any(real.is_relative_to(one) for one in allowed):
        raise UsageError(
            f"{path} is a link that leads out of its folder", fix="do not use this folder, or copy the file"
        )
    if not real.is_file():
        raise UsageError(f"{path} is no file", fix="do not use this folder, or remove it")
    if not path.name.endswith(".safetensors") and real.stat().st_size > _MAX_TEXT:
        raise UsageError(
            f"{path} has {real.stat().st_size:,} bytes, which no model needs", fix="do not use this folder"
        )
    return real


def _json(path: Path, limit: int = _MAX_TEXT) -> dict[str, Any]:
    try:
        if path.stat().st_size > limit:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON: {str(error)[:120]}", fix="download it again") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds no JSON object", fix="download it again")
    return found


def _shards(folder: Path, files: Mapping[str, Path]) -> list[str]:
    """The files of the weights, by the index where there is one."""
    if INDEX in files:
        return _indexed(folder, files)
    if found := [name for name in files if name.startswith("model") and name.endswith(".safetensors")]:
        numbered = [match for name in found if (match := _NUMBERED.fullmatch(name))]
        if numbered and len(found) != int(numbered[0][1]):
            raise NotFoundError(
                f"{folder} has {len(found)} of {int(numbered[0][1])} shards", fix="download the model again"
            )
        return found
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES):
        raise UsageError(
            f"the weights in {folder} are pickled ({pickles[0]}), and a pickle may run any code",
            fix="take a repository that has safetensors",
        )
    raise NotFoundError(f"{folder} has no model*.safetensors", fix="give the folder of a model's weights")


def _weight_map(path: Path) -> dict[str, str]:
    found = _json(path).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise UsageError(f"{path} has no weight_map", fix="download it again")
    return found


def _indexed(folder: Path, files: Mapping[str, Path]) -> list[str]:
    shards = sorted(set(_weight_map(files[INDEX]).values()))
    for shard in shards:
        if shard != PurePosixPath(shard).name or "\\" in shard or not shard.endswith(".safetensors"):
            raise UsageError(
                f"{folder / INDEX} names {shard!r:.80}, which is no safetensors file of its folder",
                fix="do not use this folder",
            )
    if missing := [shard for shard in shards if shard not in files]:
        raise NotFoundError(
            f"{folder / missing[0]} does not exist, one of {len(shards)} shards", fix="download the model again"
        )
    return shards


def _check_index(folder: Path, files: Mapping[str, Path], tensors: Mapping[str, StoredTensor]) -> None:
    if INDEX not in files:
        return
    wanted = _weight_map(files[INDEX]).keys()
    if wanted != tensors.keys():
        odd = min(wanted ^ tensors.keys())
        where = "the shards have not" if odd in wanted else "the index does not know"
        raise UsageError(
            f"{folder / INDEX} and the shards differ: {odd!r:.80}, {where}", fix="download the model again"
        )


def _check_sizes(path: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a config whose sizes the weights do not bear out: what reads it allocates by it."""
    if not tensors:
        raise UsageError(f"{path.parent} holds no tensors", fix="give the folder of a model's weights")
    widest = max((max(tensor.shape, default=1) for tensor in tensors.values()), default=1)
    # Packed weights have several elements in one.
    limits = dict.fromkeys(_LAYERS, len(tensors)) | dict.fromkeys(_WIDTHS, _SLACK * max(widest, len(tensors)))
    for part in _objects(config):
        for key in limits.keys() & part.keys():
            value = part[key]
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(n, bool | str) or not 0 <= (n or 0) <= limits[key] for n in numbers):
                raise UsageError(
                    f"{path} says {key} = {str(value)[:40]}, which its weights do not bear out",
                    fix="download it again, or do not use it",
                )


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """``value`` and all objects within it."""
    if isinstance(value, dict):
        yield value
        for one in value.values():
            yield from _objects(one)
    elif isinstance(value, list):
        for one in value:
            yield from _objects(one)


def _code(files: Mapping[str, Path]) -> Iterator[str]:
    """What of the model's own code its configuration names: transformers' ``auto_map``."""
    for name, path in files.items():
        if name.endswith("config.json"):
            for part in _objects(_json(path)):
                if "auto_map" in part:
                    yield f"{name}: {next(_strings(part['auto_map']), 'nothing')[:80]}"


def _strings(value: Any) -> Iterator[str]:
    """All texts within ``value``."""
    if isinstance(value, str):
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(one)
