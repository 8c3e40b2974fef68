"""What lint looks at, of MODEL: headers, config.json and single tensors, of files here or on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dynrun.errors import DynrunError, NotFoundError
from dynrun.gguf.header import Header
from dynrun.gguf.shards import join, read_shards
from dynrun.hub.files import RemoteFile, Repository, Variant
from dynrun.hub.headers import HeaderReader
from dynrun.hub.ranges import RangeReader
from dynrun.hub.repository import fetch_repository
from dynrun.lint.finding import Finding
from dynrun.lint.rules import lint, missing_shards

_CONFIG = "config.json"
# Far above any config.json.
_MOST_CONFIG_BYTES = 1 << 20
_REPOSITORY = re.compile(r"https?://[^/]+/([\w.-]+/[\w.-]+)/?", re.ASCII)


@dataclass(frozen=True)
class Report:
    """The findings of one file; ``config``: where the config.json is from, empty without one."""

    name: str
    findings: tuple[Finding, ...]
    config: str = ""


def lint_file(path: Path, config: Path | None = None) -> Report:
    """A GGUF here, with the config.json beside it where none is given. Raises DynrunError for what is no GGUF."""
    try:
        headers = read_shards(path)
    except NotFoundError as error:
        if not path.is_file():
            raise
        return Report(path.name, (Finding("shard-missing", "error", path.name, "all shards", error.message),))
    beside = config or path.parent / _CONFIG
    found = _parsed(beside.read_bytes(), str(beside)) if config or beside.is_file() else {}
    findings = lint(join(headers), found, lambda name: _tensor_here(headers, name))
    return Report(path.name, tuple(findings), str(beside) if found else "")


def lint_variants(
    repository: Repository, variants: Sequence[Variant], say: Callable[[str], None], config: Path | None = None
) -> list[Report]:
    """Quants of a repository on the Hub; a few megabytes are read."""
    read, reports = HeaderReader(), []
    found, where = ({}, "") if config is None else (_parsed(config.read_bytes(), str(config)), str(config))
    for variant in variants:
        if variant.missing:
            reports.append(Report(variant.label, (missing_shards(variant.missing, variant.first.path),)))
            continue
        header = read(variant)
        if not where:
            found, where = _remote_config(repository, header, say)
        findings = lint(header, found, partial(_tensor_there, read, variant))
        reports.append(Report(variant.label, tuple(findings), where))
    return reports


def _tensor_here(headers: Sequence[Header], name: str) -> bytes:
    header = next(header for header in headers if name in header.tensors)
    tensor = header.tensors[name]
    with header.path.open("rb") as stream:
        stream.seek(header.data_offset + tensor.offset)
        return stream.read(tensor.nbytes)


def _tensor_there(read: HeaderReader, variant: Variant, name: str) -> bytes:
    for file in variant.files:
        header = read.of_file(file)
        if (tensor := header.tensors.get(name)) is not None:
            with closing(RangeReader(file)) as reader:
                return reader(header.data_offset + tensor.offset, tensor.nbytes)
    raise NotFoundError(f"{variant.label} has no tensor {name}")


def _remote_config(repository: Repository, header: Header, say: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """The repository's config.json, else that of the model it names as its base."""
    file = _config_of(repository)
    if file is None and (name := _base_model(header.metadata)):
        try:
            file = _config_of(fetch_repository(name))
        except DynrunError as error:
            say(f"{name}, the base model, cannot be looked at: {error.message}")
    if file is None:
        return {}, "none"
    with closing(RangeReader(file)) as reader:
        where = f"{file.repository}/{_CONFIG}"
        return _parsed(reader(0, min(file.size, _MOST_CONFIG_BYTES)), where), where


def _config_of(repository: Repository) -> RemoteFile | None:
    return next((file for file in repository.files if file.path == _CONFIG), None)


def _base_model(metadata: Mapping[str, Any]) -> str:
    """``owner/repo`` of the model that this is a quant of, as its metadata say; empty where they do not."""
    match = _REPOSITORY.fullmatch(str(metadata.get("general.base_model.0.repo_url", "")))
    return match[1] if match else ""


def _parsed(data: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DynrunError(f"{where} is no JSON: {error}"[:300], fix="give another with --config") from error
    if not isinstance(found, dict):
        raise DynrunError(f"{where} is no configuration", fix="give another with --config")
    return found
