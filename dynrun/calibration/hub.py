"""Data sets of the Hugging Face Hub as a source: ``hf:owner/name[:config][:split]``.

Takes such a name, finds the data files of the configuration and split, downloads them into the cache that all programs
of the Hub share, and lets files.py read them. HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are the library's own.
Runs no code of a data set and asks no other server for a conversion.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dynrun.artifacts import sha256_bytes
from dynrun.calibration.dataset import Source
from dynrun.calibration.files import LIMIT_CHARS, read_files
from dynrun.errors import NotFoundError, UsageError
from dynrun.hub.errors import DATA_SET, errors_for_people

PREFIX = "hf:"
DEFAULT_SPLIT = "train"
# Of a larger data set a random choice of its files is downloaded.
LIMIT_BYTES = 2 << 30
# Of the formats that a split is there in, the first is read.
_FORMATS = (".parquet", ".jsonl", ".ndjson", ".json", ".txt", ".text")
_NO_DATA = re.compile(r"(?i)^(readme|license|licence|\.|dataset_infos?\.json|requirements)|(config|metadata)\.json$")
# What data sets call their parts (as the library `datasets` has it, data_files.py).
_SYNONYMS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# data/train_sft-00000-of-00002.parquet: any name of a split may stand there.
_SHARD = re.compile(r"(?P<split>\w[\w.]*)-\d{5}-of-\d{5}\b")

# A configuration: the patterns of each split's files.
_Patterns = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class HubName:
    """A data set, and the part of it; ``config`` is empty where the data set's default is meant."""

    repository: str
    config: str = ""
    split: str = DEFAULT_SPLIT


@dataclass(frozen=True)
class _Snapshot:
    """One commit of a data set: the sizes of its files in bytes, and the metadata of its card."""

    commit: str
    sizes: Mapping[str, int]
    card: Mapping[str, Any]


def parse_hub_name(spec: str) -> HubName:
    """``hf:owner/name[:config][:split]``. Raises UsageError for anything else."""
    repository, *rest = spec.removeprefix(PREFIX).split(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or len(rest) > 2:
        raise UsageError(f"{spec!r} names no data set", fix="write hf:owner/name, hf:owner/name:config:split")
    return HubName(repository, *(part or default for part, default in zip(rest, ("", DEFAULT_SPLIT), strict=False)))


def open_hub(spec: str, *, limit_chars: int = LIMIT_CHARS, limit_bytes: int = LIMIT_BYTES) -> Source:
    """Download and read a data set; its hash pins the commit and the files.

    Of more than ``limit_bytes`` a pseudo-random choice of whole files is taken, always the same. Raises NetworkError,
    NotFoundError (no such data set, configuration or split, or it is gated), and what reading files raises.
    """
    paths, sha256 = hub_files(parse_hub_name(spec), limit_bytes=limit_bytes)
    return read_files(paths, name=spec, sha256=sha256, limit_chars=limit_chars)


def hub_files(name: HubName, *, limit_bytes: int = LIMIT_BYTES) -> tuple[list[Path], str]:
    """The data files of ``name`` in the shared cache, and the hash of commit and names that pins them.

    Raises what :func:`open_hub` raises.
    """
    with errors_for_people(name.repository, DATA_SET):
        snapshot = _snapshot(name.repository)
        chosen = _within(limit_bytes, _data_files(name, snapshot), snapshot)
        paths = [_download(name.repository, file, snapshot.commit) for file in chosen]
    return paths, sha256_bytes(json.dumps([name.repository, snapshot.commit, chosen]).encode())


def _snapshot(repository: str) -> _Snapshot:
    """The newest commit, or without a network the newest that was downloaded."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    from huggingface_hub.repocard import metadata_load

    # Beside the card it stores the list of files, which is what we need of it.
    folder = Path(snapshot_download(repository, repo_type="dataset", allow_patterns=["README.md"]))
    try:
        tree = get_cached_repo_tree(repository, repo_type="dataset", revision=folder.name)
        sizes = {file.path: file.size for file in tree}
    except CachedRepoTreeNotFoundError:
        # Another program filled the cache, and we are offline.
        sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    card = None
    if (readme := folder / "README.md").is_file():
        try:
            card = metadata_load(readme)
        except Exception:
            # Whatever the YAML parser raises: file names tell as well as a broken card does.
            card = None
    return _Snapshot(folder.name, sizes, card or {})


def _download(repository: str, file: str, commit: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, file, repo_type="dataset", revision=commit))


def _within(limit_bytes: int, files: Sequence[str], snapshot: _Snapshot) -> list[str]:
    """As many of ``files`` as are not larger together, one at least, chosen by their hashes; sorted."""
    chosen: list[str] = []
    left = limit_bytes
    for file in sorted(files, key=lambda file: sha256_bytes(file.encode())):
        left -= snapshot.sizes[file]
        if left < 0 and chosen:
            break
        chosen.append(file)
    return sorted(chosen)


def _data_files(name: HubName, snapshot: _Snapshot) -> list[str]:
    """The files of the configuration and split, all of one format. Raises NotFoundError, naming what there is."""
    data = sorted(file for file in snapshot.sizes if _format(file))
    if not data:
        raise NotFoundError(
            f"the data set {name.repository} has no files that can be read here",
            fix=f"choose one with {', '.join(_FORMATS)} files",
        )
    configs = _configs_of_card(snapshot.card)
    splits = _of_card(name, configs, data) if configs else _of_names(name, data)
    if not (found := splits.get(name.split)):
        where = f"{name.repository}, configuration {name.config}" if name.config else name.repository
        raise NotFoundError(
            f"the data set {where} has no split {name.split!r}",
            fix=f"there are: {', '.join(sorted(s for s, files in splits.items() if files)) or 'none'}",
        )
    best = min(_FORMATS.index(_format(file)) for file in found)
    return [file for file in found if _format(file) == _FORMATS[best]]


def _format(file: str) -> str:
    """The suffix that a data file is read by; empty for other files."""
    path = PurePosixPath(file.removesuffix(".gz"))
    suffix = path.suffix.lower()
    return suffix if suffix in _FORMATS and not _NO_DATA.search(path.name) else ""


def _configs_of_card(card: Mapping[str, Any]) -> dict[str, _Patterns]:
    """The configurations with their files, as the card's YAML has them, the default one first.

    https://huggingface.co/docs/hub/datasets-manual-configuration
    """
    found: dict[str, _Patterns] = {}
    configs = card.get("configs")
    entries = [entry for entry in configs if isinstance(entry, dict)] if isinstance(configs, list) else []
    entries.sort(key=lambda entry: not (entry.get("default") is True or entry.get("config_name") == "default"))
    for entry in entries:
        if patterns := _patterns(entry.get("data_files"), str(entry.get("data_dir") or "").strip("/")):
            found[str(entry.get("config_name", "default"))] = patterns
    return found


def _patterns(data_files: Any, folder: str) -> _Patterns:
    """``data_files`` of the card: a pattern, a list of them, a mapping by split, or a list of split and path."""
    found: dict[str, list[str]] = {}
    if isinstance(data_files, str):
        data_files = [data_files]
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    for entry in data_files if isinstance(data_files, list) else []:
        split, path = (
            (entry.get("split", DEFAULT_SPLIT), entry.get("path"))
            if isinstance(entry, dict)
            else (DEFAULT_SPLIT, entry)
        )
        paths = path if isinstance(path, list) else [path]
        prefix = f"{folder}/" if folder else ""
        found.setdefault(str(split), []).extend(prefix + p.removeprefix("./") for p in paths if isinstance(p, str))
    return found


def _of_card(name: HubName, configs: Mapping[str, _Patterns], data: Sequence[str]) -> dict[str, list[str]]:
    # Ordered: the default first, or else the first of the card.
    config = name.config or next(iter(configs))
    if config not in configs:
        raise NotFoundError(
            f"the data set {name.repository} has no configuration {config!r}",
            fix=f"there are: {', '.join(sorted(configs))}",
        )
    found = {}
    for split, patterns in configs[config].items():
        expressions = [_expression(pattern) for pattern in patterns]
        found[split] = [file for file in data if any(one.fullmatch(file) for one in expressions)]
    return found


def _expression(pattern: str) -> re.Pattern[str]:
    """A glob as fsspec has it: ``*`` stays in its folder, ``**`` does not."""
    names = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern)
    return re.compile("".join(names.get(part) or (part if part.startswith("[") else re.escape(part)) for part in parts))


def _of_names(name: HubName, data: Sequence[str]) -> dict[str, list[str]]:
    """A data set without configurations in its card: folders and file names say what belongs where."""
    if name.config not in ("", "default"):
        wanted = [file for file in data if name.config in PurePosixPath(file).parts[:-1]]
        if not wanted:
            folders = sorted({part for file in data for part in PurePosixPath(file).parts[:-1]})
            raise NotFoundError(
                f"the data set {name.repository} has no configuration {name.config!r}",
                fix=f"its folders are: {', '.join(folders)}" if folders else "it has only the default one",
            )
        data = wanted
    found: dict[str, list[str]] = {}
    for file in data:
        found.setdefault(_split_of_name(file), []).append(file)
    unnamed = found.pop("", [])
    # Where no file is named after a split, all of it is there to train on.
    return found or {DEFAULT_SPLIT: unnamed}


def _split_of_name(file: str) -> str:
    """The split that a path names, the file's own name before its folders; empty where it names none."""
    parts = PurePosixPath(file).parts
    if shard := _SHARD.match(parts[-1]):
        return shard["split"]
    for part in reversed(parts):
        words = re.split(r"[\W_\d]+", part.lower())
        for split, synonyms in _SYNONYMS.items():
            if any(word in synonyms for word in words):
                return split
    return ""
