"""Compare a made GGUF with what it says of itself: its scheme, its imatrix, its reference; and make it again.

Takes a file and whatever of these is at hand, gives a list of :class:`Check`: what holds, what does not, and what could
not be looked at. Measures nothing.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynrun.artifacts import sha256_file
from dynrun.errors import DynrunError, NotFoundError
from dynrun.gguf.header import Header
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.shards import SPLIT_KEYS, read_shards, read_whole_header, split_name
from dynrun.gguf.tensor_types import FULL_PRECISION, TENSOR_TYPES
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp.library import ggml
from dynrun.scheme import Scheme, read_scheme, sha256

PROVENANCE = ("dynrun.version", "dynrun.label", "dynrun.scheme.sha256", "dynrun.imatrix.sha256", "dynrun.feedback")
# What llama-quantize and dynrun write themselves, and what says how a file is split.
_WRITTEN = ("general.file_type", "general.quantization_version", "quantize.", "dynrun.", *SPLIT_KEYS)
# Σ(w−q)²/Σw² of a tensor of 1.5 bits is about a half; zeros in the place of a tensor give 1, another tensor 2.
_MOST_ERROR = 0.9
_ROWS = 4096
OnTensor = Callable[[int, int], None]


@dataclass(frozen=True)
class Check:
    """``ok`` is None where it could not be looked at; ``detail`` says what was found, or what is missing."""

    name: str
    ok: bool | None
    detail: str


@dataclass(frozen=True)
class Given:
    """What a file is compared with, as far as it is at hand. ``scheme`` is the path of one."""

    scheme: Path | None = None
    reference: Header | None = None
    imatrix: Path | None = None


def verify(path: Path, given: Given, on_tensor: OnTensor = lambda done, total: None) -> list[Check]:
    """Every check but :func:`remade`, in order; of a damaged file the first alone.

    Raises NotFoundError where ``path`` is missing, UsageError for a scheme that is none.
    """
    try:
        headers, header = read_shards(path), read_whole_header(path)
    except NotFoundError:
        raise
    except DynrunError as error:
        return [Check("file", False, error.message)]
    checks = [_whole(headers), _provenance(header)]
    scheme = scheme_of_file(path, header, given.scheme)
    checks.append(_scheme_check(path, header, scheme))
    if scheme is not None:
        checks += [_types(header, scheme), _size(headers, header, scheme)]
    checks.append(_imatrix(header, scheme, given.imatrix))
    reference = given.reference
    if reference is None:
        return [*checks, Check("reference", None, "not compared: name it with --reference")]
    checks += [_source(reference, scheme), _shapes(header, reference), _metadata(header, reference)]
    if not checks[-2].ok:
        return [*checks, Check("weights", None, "not compared: the tensors are others")]
    return [*checks, _kept(headers, reference), _weights(headers, reference, on_tensor)]


def remade(path: Path, again: Path) -> Check:
    """Whether ``again``, made anew by the scheme of the file at ``path``, has the same bytes: the whole file's, and of
    a split one the bytes of each tensor."""
    headers = read_shards(path)
    if len(headers) == 1:
        if _digest(path) == _digest(again):
            return Check("bytes", True, f"made again: the same {path.stat().st_size:,} bytes")
        where = _first_difference(headers, read_shards(again))
        return Check("bytes", False, f"made again, it differs{f' in {where}' if where else ' in its metadata'}")
    where = _first_difference(headers, read_shards(again))
    held = "made again: every tensor has the same bytes" if not where else f"made again, it differs in {where}"
    return Check("bytes", not where, held)


def _digest(path: Path) -> str:
    """Of what lies there now: :func:`sha256_file` remembers, and what is damaged may keep its time and size."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _first_difference(one: tuple[Header, ...], other: tuple[Header, ...]) -> str:
    mine, theirs = dict(_tensor_bytes(one)), dict(_tensor_bytes(other))
    if mine.keys() != theirs.keys():
        return min(mine.keys() ^ theirs.keys())
    return next((name for name in mine if not np.array_equal(mine[name], theirs[name])), "")


def _tensor_bytes(headers: tuple[Header, ...]) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    """Name and bytes of each tensor of a file or of all its shards; mapped, not read."""
    for header in headers:
        with header.path.open("rb") as stream:
            data = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
        for name, tensor in header.tensors.items():
            begin = header.data_offset + tensor.offset
            yield name, data[begin : begin + tensor.nbytes]


def _whole(headers: tuple[Header, ...]) -> Check:
    """Nothing is missing (reading the headers saw to that) and nothing lies behind the last tensor."""
    for header in headers:
        end = header.data_offset + max((t.offset + t.nbytes for t in header.tensors.values()), default=0)
        if header.file_bytes - end >= header.alignment:
            return Check("file", False, f"{header.file_bytes - end:,} bytes behind the last tensor of {header.path}")
    total = sum(header.file_bytes for header in headers)
    return Check("file", True, f"{total:,} bytes" + (f" in {len(headers)} shards" if len(headers) > 1 else ""))


def _provenance(header: Header) -> Check:
    missing = [key for key in PROVENANCE if not isinstance(header.metadata.get(key), str)]
    if missing:
        return Check("provenance", False, f"its metadata has no {', '.join(missing)}: dynrun did not make this file")
    said = header.metadata
    return Check("provenance", True, f"dynrun {said['dynrun.version']}, {said['dynrun.label']}")


def scheme_of_file(path: Path, header: Header, given: Path | None) -> Scheme | None:
    """The scheme, from ``given`` or from beside the file; rounded as the file says it was."""
    beside = path.with_name(f"{split_name(path)}.scheme.toml")
    where = given or (beside if beside.is_file() else None)
    if where is None:
        return None
    scheme = read_scheme(where, quantizable(header))
    rounding = str(header.metadata.get("dynrun.feedback", "")).strip()
    if rounding == scheme.feedback or rounding in ("", "none"):
        return scheme if rounding == scheme.feedback else replace(scheme, feedback="", feedback_except="")
    return replace(scheme, feedback=rounding)


def _scheme_check(path: Path, header: Header, scheme: Scheme | None) -> Check:
    if scheme is None:
        return Check("scheme", None, f"none lies beside {path.name}: name one with --scheme")
    said, found = header.metadata.get("dynrun.scheme.sha256"), sha256(scheme)
    if found == said:
        return Check("scheme", True, f"sha256 {found[:16]}…")
    return Check("scheme", False, f"the file was made by scheme {str(said)[:16]}…, this one is {found[:16]}…")


def _types(header: Header, scheme: Scheme) -> Check:
    tensors = quantizable(header)
    for name, wanted in scheme.types.items():
        found = tensors[name].type if name in tensors else "missing"
        if found != wanted:
            return Check("types", False, f"{name} is {found}, the scheme says {wanted}")
    if more := tensors.keys() - scheme.types.keys():
        return Check("types", False, f"the scheme does not name {min(more)}")
    return Check("types", True, f"{len(tensors)} tensors")


def _size(headers: tuple[Header, ...], header: Header, scheme: Scheme) -> Check:
    found, wanted = header.file_bytes, scheme.size_bytes
    if not wanted:
        return Check("size", None, "the scheme does not say a size")
    if len(headers) > 1:
        within = not scheme.budget_bytes or found <= scheme.budget_bytes
        return Check("size", within, f"{found:,} bytes in shards, {wanted:,} as one file")
    return Check("size", found == wanted, f"{found:,} bytes; the scheme says {wanted:,}")


def _imatrix(header: Header, scheme: Scheme | None, path: Path | None) -> Check:
    said = header.metadata.get("dynrun.imatrix.sha256")
    if path is not None:
        found = sha256_file(path)
        return Check("imatrix", found == said, f"{path}: {found[:16]}…; the file was made with {str(said)[:16]}…")
    if scheme is None or not scheme.imatrix_sha256:
        return Check("imatrix", None, "not compared: name it with --imatrix")
    same = scheme.imatrix_sha256 == said
    return Check("imatrix", same, f"the scheme's is {scheme.imatrix_sha256[:16]}…, the file's {str(said)[:16]}…")


def _source(reference: Header, scheme: Scheme | None) -> Check:
    found = sha256_file(reference.path)
    if scheme is None or not scheme.source_sha256:
        return Check("reference", None, f"{reference.path.name}: {found[:16]}…; nothing says which it should be")
    same = found == scheme.source_sha256
    return Check("reference", same, f"{found[:16]}…; the scheme was made for {scheme.source_sha256[:16]}…")


def _shapes(header: Header, reference: Header) -> Check:
    mine = {name: tensor.shape for name, tensor in header.tensors.items()}
    theirs = {name: tensor.shape for name, tensor in reference.tensors.items()}
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            return Check("tensors", False, f"{name} is {mine.get(name)}, in the reference {theirs.get(name)}")
    return Check("tensors", True, f"{len(mine)} of the reference's names and shapes")


def _metadata(header: Header, reference: Header) -> Check:
    """All that the reference says of the model, tokenizer and template included, is in the file unchanged."""
    compared = {key: value for key, value in reference.metadata.items() if not key.startswith(_WRITTEN)}
    for key, value in compared.items():
        if not _equal(header.metadata.get(key), value):
            return Check("metadata", False, f"{key} is not what it is in the reference")
    added = [k for k in header.metadata if k not in reference.metadata and not k.startswith(_WRITTEN)]
    if added:
        return Check("metadata", False, f"{min(added)} is not in the reference")
    return Check("metadata", True, f"{len(compared)} entries as in the reference")


def _equal(one: Any, other: Any) -> bool:
    # A NaN in a list of scores equals itself here.
    return one == other or repr(one) == repr(other)


def _kept(headers: tuple[Header, ...], reference: Header) -> Check:
    """Tensors that no scheme names: bit by bit as in the reference."""
    mine, theirs = dict(_tensor_bytes(headers)), dict(_tensor_bytes(read_shards(reference.path)))
    kept = [name for name in theirs if name not in quantizable(reference)]
    changed = [name for name in kept if not np.array_equal(mine[name], theirs[name])]
    if changed:
        return Check("kept tensors", False, f"{min(changed)} has other values than in the reference")
    return Check("kept tensors", True, f"{len(kept)} with the reference's bytes")


def _weights(headers: tuple[Header, ...], reference: Header, on_tensor: OnTensor) -> Check:
    """Every quantized tensor is finite and near the reference's; the worst is named."""
    worst, where, done = 0.0, "", 0
    weights, n_tensors = WeightFile(reference.path), len(quantizable(reference))
    for header in headers:
        made = WeightFile(header.path)
        for name in quantizable(header):
            error = _relative_error(made, weights, name)
            if not np.isfinite(error):
                return Check("weights", False, f"{name} holds values that are not finite")
            worst, where = max((worst, where), (error, name))
            done += 1
            on_tensor(done, n_tensors)
    detail = f"largest relative squared error {worst:.4f}, of {where}" if where else "as in the reference"
    return Check("weights", worst <= _MOST_ERROR, detail)


def _relative_error(made: WeightFile, weights: WeightFile, name: str) -> float:
    """Σ(w−q)²/Σw² of a tensor; NaN or infinite where a value is."""
    wrong = whole = 0.0
    for begin in range(0, weights.n_rows(name), _ROWS):
        original = weights.rows(name, slice(begin, begin + _ROWS)).astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            wrong += float(np.square(original - _values(made, name, begin, len(original))).sum())
        whole += float(np.square(original).sum())
    return wrong / whole if whole else wrong


def _values(made: WeightFile, name: str, begin: int, n_rows: int) -> npt.NDArray[np.float32]:
    """Rows of a tensor of any type, as float32."""
    tensor = made.header.tensors[name]
    if tensor.type in FULL_PRECISION:
        return made.rows(name, slice(begin, begin + n_rows), finite=False)
    kind, n_columns = TENSOR_TYPES[tensor.type], tensor.shape[0]
    return ggml().dequantize(kind.ggml_id, made.row_bytes(name, begin, n_rows), n_rows, n_columns)
