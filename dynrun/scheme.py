"""The scheme: a small TOML file that says which type each tensor of a quantized model has, and where that comes from.

Renders a :class:`Scheme` to text that a person can review, and reads it back strictly. A person may write one by hand:
of [scheme] only ``format`` is needed, and [types] may have lines for all layers of a kind and a ``default``. Knows
names only; whether a type fits a tensor's shape is not its business. The tables of tensors: scheme_types.py.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dynrun.artifacts import sha256_bytes, write_text
from dynrun.errors import DynrunError, NotFoundError, UsageError
from dynrun.scheme_types import (
    Slopes,
    check_type,
    expand,
    finite,
    nearest,
    read_slopes,
    read_types,
    render_slopes,
    render_types,
    toml,
)

FORMAT = 1
# Its keys in the order of the file.
_HEAD: dict[str, type] = {
    "label": str,
    "architecture": str,
    "source": str,
    "source_sha256": str,
    "budget_bytes": int,
    "size_bytes": int,
    "predicted_kld": float,
    "measured_kld": float,
    "probe_tokens": int,
    "calibration": str,
    "imatrix_sha256": str,
    "feedback": str,
    "feedback_except": str,
    "llama_cpp_commit": str,
    "dynrun": str,
}
# What llama-quantize can be told (dynrun.label in the metadata), and what may be part of a file's name.
_MAX_LABEL_BYTES = 127
_LABEL = re.compile(r"[^/\\\x00-\x1f\x7f]+")


@dataclass(frozen=True)
class Scheme:
    """``types`` holds every quantizable tensor; sizes are bytes of the whole file; KLDs are in nats per token.

    ``source`` names the model, ``calibration`` the conversations (name and hash), ``dynrun`` the version that made it.
    Unknown is "", 0 of a size, or None; a scheme of unknown architecture is for any. ``rules`` are lines of a file read
    without a model's names at hand: ``blk.*.KIND``, of all layers that ``types`` does not name, and ``default``.
    ``slopes``: the points (weighted error, KLD) that were measured of a tensor, for a fine-tune of the same shape.
    ``feedback``: statistics and settings of error-feedback rounding, "" for none; ``feedback_except``: the kinds of
    tensors that are rounded without, in alphabetical order with a space between.
    """

    types: Mapping[str, str]
    label: str
    architecture: str = ""
    source: str = ""
    source_sha256: str = ""
    budget_bytes: int = 0
    size_bytes: int = 0
    predicted_kld: float | None = None
    calibration: str = ""
    imatrix_sha256: str = ""
    llama_cpp_commit: str = ""
    dynrun: str = ""
    measured_kld: float | None = None
    probe_tokens: int | None = None
    rules: Mapping[str, str] = field(default_factory=dict)
    slopes: Slopes = field(default_factory=dict)
    feedback: str = ""
    feedback_except: str = ""


def render(scheme: Scheme) -> str:
    """The scheme as TOML, without what is unknown: the same text for equal schemes."""
    values = {key: getattr(scheme, key) for key in _HEAD}
    optional = {"measured_kld": None, "probe_tokens": None, "predicted_kld": None}
    lines = ["[scheme]", f"format = {FORMAT}", f"label = {toml(scheme.label)}"]
    for key, wanted in _HEAD.items():
        if key != "label" and values[key] != optional.get(key, wanted()):
            lines.append(f"{key} = {toml(values[key])}")
    lines += ["", *render_types(scheme.types, scheme.rules)]
    if scheme.slopes:
        lines += ["", *render_slopes(scheme.slopes)]
    return "\n".join(lines) + "\n"


def parse(text: str, *, where: str, tensors: Collection[str] | None = None) -> Scheme:
    """Read ``text``; ``where`` names it in errors, ``tensors`` are the quantizable tensors of the model at hand.

    With ``tensors`` the rules for all layers and the default are expanded; a tensor's own line goes before the rule of
    its kind, that before the default. The label defaults to the name of the file.

    Raises UsageError for invalid TOML, another format version, an unknown key, a missing format or [types], a value of
    the wrong type, a label that can be no part of a file's name, an unknown tensor type, a malformed range or slope, a
    tensor named twice, and, where ``tensors`` is given, an unknown or missing tensor.
    """
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not valid TOML: {error}", fix="correct it, or make the scheme again") from error
    _check_format(data, where)
    _check_keys(data, ("scheme", "types", "slopes"), ("scheme", "types"), where)
    head = _head(data["scheme"], f"{where}, [scheme]")
    head.setdefault("label", Path(where).name.removesuffix(".toml").removesuffix(".scheme"))
    _check_label(head["label"], f"{where}, [scheme]")
    types, rules = read_types(data["types"], where, tensors)
    slopes = read_slopes(data["slopes"], where, tensors) if "slopes" in data else {}
    return Scheme(types=types, rules=rules, slopes=slopes, **head)


def read_scheme(path: Path, tensors: Collection[str] | None = None) -> Scheme:
    """:func:`parse` of a file. Raises NotFoundError where there is none, DynrunError where it cannot be read."""
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist", fix="check the path")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}", fix="give a scheme, a TOML file") from error
    except OSError as error:
        raise DynrunError(f"{path} cannot be read: {error.strerror}", fix="check its permissions") from error
    return parse(text, where=str(path), tensors=tensors)


def write_scheme(scheme: Scheme, path: Path) -> None:
    """Write :func:`render`'s text atomically."""
    write_text(path, render(scheme))


def sha256(scheme: Scheme) -> str:
    """Hex SHA-256 of :func:`render`'s text."""
    return sha256_bytes(render(scheme).encode())


def expanded(scheme: Scheme, tensors: Iterable[str]) -> Scheme:
    """The scheme with its rules applied to those of ``tensors`` that it does not name; nothing is checked."""
    return replace(scheme, types=expand(scheme.types, scheme.rules, tensors), rules={}) if scheme.rules else scheme


def check_architecture(scheme: Scheme, architecture: str, path: Path) -> None:
    """Raise UsageError where the GGUF at ``path`` is of another ``architecture`` than the scheme's, if that has one."""
    if scheme.architecture and architecture != scheme.architecture:
        raise UsageError(
            f"{path} is a {architecture or 'nameless'} model and the scheme is for {scheme.architecture}",
            fix=f"use a scheme made for {architecture}" if architecture else "give a GGUF of a model",
        )


def fitting_label(text: str) -> str:
    """``text`` (of somebody's file) as a label: what is not allowed in one is replaced or cut off."""
    clean = re.sub(r"[/\\\x00-\x1f\x7f]", "_", text).encode("utf-8", "replace")[:_MAX_LABEL_BYTES]
    return clean.decode("utf-8", "ignore") or "?"


def _check_label(label: str, place: str) -> None:
    if not _LABEL.fullmatch(label) or len(label.encode("utf-8", "replace")) > _MAX_LABEL_BYTES:
        raise UsageError(
            f"{place} label is {label!r:.60}",
            fix=f"give one of 1 to {_MAX_LABEL_BYTES} bytes without slashes and control characters",
        )


def _check_format(data: Mapping[str, Any], where: str) -> None:
    """Before anything else: a later format may have other keys."""
    head = data.get("scheme")
    if isinstance(head, dict) and "format" in head and (type(head["format"]), head["format"]) != (int, FORMAT):
        raise UsageError(
            f"{where}, [scheme]: format {head['format']!r} is unknown; this dynrun reads format {FORMAT}",
            fix="use the dynrun that made it, or make the scheme again",
        )


def _check_keys(table: Mapping[str, Any], known: Collection[str], needed: Iterable[str], place: str) -> None:
    for key in table:
        if key not in known:
            raise UsageError(f"{place}: unknown key {key!r}", fix=nearest(key, known))
    for key in needed:
        if key not in table:
            raise UsageError(f"{place}: {key!r} is missing", fix="add it, or make the scheme again")


def _head(table: object, place: str) -> dict[str, Any]:
    check_type(table, dict, place)
    assert isinstance(table, dict)
    _check_keys(table, ("format", *_HEAD), ("format",), place)
    head: dict[str, Any] = {}
    for key, wanted in _HEAD.items():
        if key not in table:
            continue
        check_type(table[key], wanted, f"{place} {key}")
        if wanted is not str and not (finite(table[key]) and table[key] >= 0):
            raise UsageError(f"{place} {key} is {table[key]}", fix="it must be finite and not negative")
        head[key] = float(table[key]) if wanted is float else table[key]
    return head
