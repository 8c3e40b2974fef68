"""The scheme: a small TOML file that says which type each tensor of a quantized model has, and where that comes from.

Renders a :class:`Scheme` to text that a person can review, and reads it back strictly: whatever is unknown, missing or
said twice is an error that names the place. Knows names only; whether a type fits a tensor's shape is not its business.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dynrun.artifacts import sha256_bytes, write_text
from dynrun.errors import DynrunError, NotFoundError, UsageError
from dynrun.gguf.tensor_types import TENSOR_TYPES

FORMAT = 1
# Layers have at most four digits, so that a slip of the finger names no million of them.
_LAYER = "(0|[1-9][0-9]{0,3})"
_BLOCK = re.compile(rf"blk\.{_LAYER}\.(.+)", re.DOTALL)
_KIND = re.compile(r"blk\.\*\.(.+)", re.DOTALL)
_RANGE = re.compile(rf"{_LAYER}(?:-{_LAYER})?")
_TYPES = tuple(name for name in TENSOR_TYPES if name not in ("I8", "I16", "I32", "I64", "F64"))
_HEAD: dict[str, type] = {
    "label": str,
    "architecture": str,
    "source": str,
    "source_sha256": str,
    "budget_bytes": int,
    "size_bytes": int,
    "predicted_kld": float,
    "calibration": str,
    "imatrix_sha256": str,
    "llama_cpp_commit": str,
    "dynrun": str,
}


@dataclass(frozen=True)
class Scheme:
    """``types`` holds every quantizable tensor; sizes are bytes of the whole file; the KLD is in nats per token.

    ``source`` names the model, ``calibration`` the conversations (name and hash), ``dynrun`` the version that made it.
    """

    types: Mapping[str, str]
    label: str
    architecture: str
    source: str
    source_sha256: str
    budget_bytes: int
    size_bytes: int
    predicted_kld: float
    calibration: str
    imatrix_sha256: str
    llama_cpp_commit: str
    dynrun: str


def render(scheme: Scheme) -> str:
    """The scheme as TOML: the same text for equal schemes."""
    lines = ["[scheme]", f"format = {FORMAT}"]
    lines += [f"{key} = {_toml(getattr(scheme, key))}" for key in _HEAD]
    lines += ["", "[types]", f"# {_mixture(scheme.types)}"]
    kinds: defaultdict[str, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for name, type_name in sorted(scheme.types.items()):
        if block := _BLOCK.fullmatch(name):
            kinds[block[2]][type_name].append(int(block[1]))
        else:
            lines.append(f"{_toml(name)} = {_toml(type_name)}")
    for kind, layers in sorted(kinds.items()):
        lines += ["", f"[types.{_toml(f'blk.*.{kind}')}]"]
        lines += [f"{name} = {_toml(_ranges(layers[name]))}" for name in sorted(layers, key=_coarseness)]
    return "\n".join(lines) + "\n"


def parse(text: str, *, where: str, tensors: Collection[str] | None = None) -> Scheme:
    """Read ``text``; ``where`` names it in errors, ``tensors`` are the quantizable tensors of the model at hand.

    Raises UsageError for invalid TOML, another format version, an unknown or missing key, a value of the wrong type, an
    unknown tensor type, a malformed range, a tensor named twice, and, where ``tensors`` is given, an unknown or missing
    tensor.
    """
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not valid TOML: {error}", fix="correct it, or make the scheme again") from error
    _check_format(data, where)
    _check_keys(data, ("scheme", "types"), where)
    head = _head(data["scheme"], f"{where}, [scheme]")
    types = _Types(where, tensors)
    types.read(data["types"])
    return Scheme(types=types.complete(), **head)


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


def check_architecture(scheme: Scheme, architecture: str, path: Path) -> None:
    """Raise UsageError where the GGUF at ``path`` is of another ``architecture`` than the scheme's."""
    if architecture != scheme.architecture:
        raise UsageError(
            f"{path} is a {architecture or 'nameless'} model and the scheme is for {scheme.architecture}",
            fix=f"use a scheme made for {architecture}" if architecture else "give a GGUF of a model",
        )


def _toml(value: str | int | float) -> str:
    """A TOML value. JSON's escapes are TOML's, but for DEL; a name out of a broken file system may hold surrogates."""
    if isinstance(value, float):
        return repr(float(value))
    if isinstance(value, int):
        return str(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f").encode("utf-8", "replace").decode()


def _coarseness(type_name: str) -> tuple[float, str]:
    return TENSOR_TYPES[type_name].bpw, type_name


def _mixture(types: Mapping[str, str]) -> str:
    counts = Counter(types.values())
    parts = [f"{counts[name]} {name} ({TENSOR_TYPES[name].bpw:.4g})" for name in sorted(counts, key=_coarseness)]
    return f"Tensors of each type (bits per weight): {', '.join(parts)}"


def _ranges(layers: Iterable[int]) -> str:
    """Layers as "0-3, 5"."""
    runs: list[tuple[int, int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], layer
        else:
            runs.append((layer, layer))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _layers(text: str, place: str) -> list[int]:
    """The inverse of :func:`_ranges`, in any order."""
    layers: list[int] = []
    for item in text.split(","):
        match = _RANGE.fullmatch(item.strip())
        first = int(match[1]) if match else 0
        last = int(match[2]) if match and match[2] else first
        if match is None or (match[2] and last <= first):
            raise UsageError(f"{place}: {item.strip()!r} is no layer and no range", fix='write layers as "0-3, 5"')
        layers += range(first, last + 1)
    return layers


def _nearest(word: str, known: Collection[str]) -> str:
    """``fix`` of an error about ``word``, letter case aside."""
    folded = {name.lower(): name for name in sorted(known)}
    near = get_close_matches(word.lower(), folded, n=1, cutoff=0.0)
    return f"the nearest valid one is {folded[near[0]]!r}" if near else "remove it"


def _nearest_tensor(name: str, tensors: Collection[str]) -> str:
    if block := _BLOCK.fullmatch(name):
        matches = (_BLOCK.fullmatch(tensor) for tensor in tensors)
        layers = [int(match[1]) for match in matches if match and match[2] == block[2]]
        if layers:
            layer = min(layers, key=lambda n: (abs(n - int(block[1])), n))
            return f"the nearest valid one is {f'blk.{layer}.{block[2]}'!r}"
    return _nearest(name, tensors)


def _check_format(data: Mapping[str, Any], where: str) -> None:
    """Before anything else: a later format may have other keys."""
    head = data.get("scheme")
    if isinstance(head, dict) and "format" in head and (type(head["format"]), head["format"]) != (int, FORMAT):
        raise UsageError(
            f"{where}, [scheme]: format {head['format']!r} is unknown; this dynrun reads format {FORMAT}",
            fix="use the dynrun that made it, or make the scheme again",
        )


def _check_keys(table: Mapping[str, Any], known: Collection[str], place: str) -> None:
    for key in table:
        if key not in known:
            raise UsageError(f"{place}: unknown key {key!r}", fix=_nearest(key, known))
    for key in known:
        if key not in table:
            raise UsageError(f"{place}: {key!r} is missing", fix="add it, or make the scheme again")


def _check_type(value: object, wanted: type, place: str) -> None:
    # A bool is an int to Python, and a whole number is a fine float to a person.
    fits = type(value) is wanted or (wanted is float and type(value) is int)
    if not fits:
        names = {str: "a string", int: "an integer", float: "a number", dict: "a table"}
        raise UsageError(f"{place} is {value!r:.60}", fix=f"it must be {names[wanted]}")


def _head(table: object, place: str) -> dict[str, Any]:
    _check_type(table, dict, place)
    assert isinstance(table, dict)
    _check_keys(table, ("format", *_HEAD), place)
    for key, wanted in _HEAD.items():
        _check_type(table[key], wanted, f"{place} {key}")
        # Not >= 0: a nan fails it too.
        if wanted is not str and not 0 <= table[key] < float("inf"):
            raise UsageError(f"{place} {key} is {table[key]}", fix="it must be finite and not negative")
    return {key: float(table[key]) if wanted is float else table[key] for key, wanted in _HEAD.items()}


class _Types:
    """Collects tensor → type from the [types] table and refuses what cannot be meant."""

    def __init__(self, where: str, tensors: Collection[str] | None) -> None:
        self.where = where
        self.tensors = None if tensors is None else frozenset(tensors)
        self.types: dict[str, str] = {}
        self.places: dict[str, str] = {}

    def read(self, table: object) -> None:
        place = f"{self.where}, [types]"
        _check_type(table, dict, place)
        assert isinstance(table, dict)
        for key, value in table.items():
            if isinstance(value, dict):
                self._read_kind(key, value)
                continue
            line = f"{place} {_toml(key)}"
            _check_type(value, str, line)
            if _KIND.fullmatch(key):
                raise UsageError(f"{line}: no layers are given", fix=f"make it a table: [types.{_toml(key)}]")
            self._add(key, value, line)

    def _read_kind(self, key: str, table: Mapping[str, Any]) -> None:
        place = f"{self.where}, [types.{_toml(key)}]"
        kind = _KIND.fullmatch(key)
        if kind is None:
            raise UsageError(
                f'{place}: tables are for tensors of blocks, as [types."blk.*.attn_q.weight"]',
                fix='write another tensor on a line of [types], quoted: "token_embd.weight" = "Q4_K"',
            )
        if not table:
            raise UsageError(f"{place} is empty", fix="give its types and layers, or remove it")
        for type_name, layers in table.items():
            line = f"{place} {type_name}"
            self._check_type_name(type_name, line)
            _check_type(layers, str, line)
            for layer in _layers(layers, line):
                self._add(f"blk.{layer}.{kind[1]}", type_name, line)

    def _check_type_name(self, type_name: str, place: str) -> None:
        if type_name not in _TYPES:
            raise UsageError(f"{place}: unknown tensor type {type_name!r}", fix=_nearest(type_name, _TYPES))

    def _add(self, tensor: str, type_name: str, place: str) -> None:
        self._check_type_name(type_name, place)
        if self.tensors is not None and tensor not in self.tensors:
            raise UsageError(
                f"{place}: the model has no quantizable tensor {tensor!r}", fix=_nearest_tensor(tensor, self.tensors)
            )
        if tensor in self.types:
            other = self.places[tensor].removeprefix(f"{self.where}, ")
            raise UsageError(f"{place}: {tensor!r} is named twice", fix=f"it is in {other} already; keep one")
        self.types[tensor], self.places[tensor] = type_name, place

    def complete(self) -> dict[str, str]:
        """All that was read. Raises UsageError where a tensor of the model is missing."""
        if missing := (self.tensors or frozenset()) - set(self.types):
            more = f" and {len(missing) - 1} more have" if len(missing) > 1 else " has"
            raise UsageError(
                f"{self.where}, [types]: {min(missing)!r}{more} no type",
                fix="add it, or make the scheme for this model",
            )
        return self.types
