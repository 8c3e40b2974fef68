"""From a scheme, or a stock preset, to a GGUF, by llama-quantize; read back and proved before anybody sees it.

Gives a file whose every tensor has exactly the type that was asked for and whose size is the one predicted, to the
byte; and splits one into shards. Rounds nothing itself.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynrun import __version__
from dynrun.allocation.rounding_choice import tensors_of
from dynrun.artifacts import (
    Outcome,
    StageFolder,
    link_or_copy,
    run_stage,
    sha256_file,
    stage_folder,
    translated_os_errors,
)
from dynrun.calibration.imatrix import read_imatrix
from dynrun.calibration.stage import IMATRIX_FILE, ImatrixStage
from dynrun.errors import DoesNotFitError, DynrunError, UsageError
from dynrun.gguf.header import DEFAULT_ALIGNMENT, Header, read_header
from dynrun.gguf.layout import metadata_bytes, quantized_file_bytes, tensor_bytes
from dynrun.gguf.quant_label import FTYPES
from dynrun.gguf.quantizable import candidate_types, quantizable
from dynrun.gguf.shards import read_shards, shard_path
from dynrun.gguf.tensor_types import DEFAULT_MENU, TENSOR_TYPES
from dynrun.llamacpp import tools
from dynrun.llamacpp.build import installation
from dynrun.models import Reference
from dynrun.rounding.store import Feedback
from dynrun.rounding.write import write_rounded
from dynrun.scheme import Scheme, check_architecture, render, sha256

MODEL_FILE = "model.gguf"
_TYPES_FILE = "tensor-types.txt"
_SCHEME_FILE = "scheme.toml"
_ROUNDED_FILE = "rounded.gguf"
# llama-quantize takes strings of at most 127 bytes.
_FEEDBACK_LENGTH = 127
# Presets that a label may name: every ftype whose own type is quantized.
STOCK_PRESETS = tuple(name for name in FTYPES.values() if name not in ("F32", "F16", "BF16"))
OnTensor = Callable[[int, int], None]


@dataclass(frozen=True)
class Quantized:
    """A quantized file."""

    path: Path
    size_bytes: int
    types: Mapping[str, str]
    outcome: Outcome


@dataclass(frozen=True)
class Preset:
    """A stock preset of one model: the type it gives each tensor, and the size of the file in bytes."""

    ftype: str
    types: Mapping[str, str]
    size_bytes: int


def stock_preset(reference: Reference, ftype: str, imatrix: ImatrixStage) -> Preset:
    """What llama-quantize would make, found by a dry run. Raises UsageError for an unknown ftype."""
    if ftype not in STOCK_PRESETS:
        raise UsageError(f"llama.cpp has no preset {ftype!r}", fix=f"one of {', '.join(STOCK_PRESETS)}")
    plan = tools.quantize_dry_run(reference.path, ftype, imatrix=imatrix.path)
    size = quantized_file_bytes(reference.header, plan.types, *_imatrix_metadata(imatrix))
    return Preset(ftype, plan.types, size)


def _imatrix_metadata(imatrix: ImatrixStage) -> tuple[dict[str, str], tuple[str, ...]]:
    """The strings and the numbers that llama-quantize writes about an imatrix."""
    strings = {"quantize.imatrix.file": IMATRIX_FILE, "quantize.imatrix.dataset": imatrix.dataset[:127]}
    return strings, ("quantize.imatrix.entries_count", "quantize.imatrix.chunks_count")


def scheme_metadata(scheme_sha256: str, imatrix_sha256: str, label: str, feedback: str = "") -> dict[str, str]:
    """What dynrun writes into a file's metadata; of the same length for every scheme of one label."""
    return {
        "dynrun.version": __version__,
        "dynrun.label": label,
        "dynrun.scheme.sha256": scheme_sha256,
        "dynrun.imatrix.sha256": imatrix_sha256,
        # Of one length with feedback and without: a budget is met before it is known whether it pays.
        "dynrun.feedback": (feedback or "none").ljust(_FEEDBACK_LENGTH),
    }


def fixed_bytes(reference: Reference, imatrix: ImatrixStage, label: str) -> int:
    """Bytes of a file made by a scheme that no choice of types changes: metadata and unquantized tensors."""
    chosen = quantizable(reference.header)
    kept = sum(tensor_bytes(t, t.type) for name, t in reference.header.tensors.items() if name not in chosen)
    return _metadata_bytes(reference, imatrix, label) + kept


def _metadata_bytes(reference: Reference, imatrix: ImatrixStage, label: str) -> int:
    strings, numbers = _imatrix_metadata(imatrix)
    strings |= scheme_metadata("0" * 64, "0" * 64, label) | reference.provenance
    return metadata_bytes(reference.header, strings, numbers)


def make_stock(
    reference: Reference, preset: Preset, imatrix: ImatrixStage, *, n_threads: int, on_tensor: OnTensor
) -> Quantized:
    """The stock preset's file, with the imatrix, or find it."""

    def work(folder: StageFolder) -> Mapping[str, Any]:
        link_or_copy(imatrix.path, folder / IMATRIX_FILE)
        _run(reference.path, folder.path, preset.ftype, imatrix, n_threads, on_tensor)
        _prove(folder / MODEL_FILE, reference.header, preset.types, preset.size_bytes)
        return {"sha256": sha256_file(folder / MODEL_FILE)}

    folder = _stock_folder(reference, preset.ftype, imatrix)
    outcome = run_stage(folder, work)
    return Quantized(folder / MODEL_FILE, preset.size_bytes, preset.types, outcome)


def _stock_folder(reference: Reference, ftype: str, imatrix: ImatrixStage) -> StageFolder:
    return stage_folder("stock", {**_common_inputs(reference, imatrix), "ftype": ftype})


def known_stock(reference: Reference, imatrix: ImatrixStage) -> dict[str, Path]:
    """The stock presets' files that have been made with this imatrix, by ftype."""
    folders = {ftype: _stock_folder(reference, ftype, imatrix) for ftype in STOCK_PRESETS}
    return {ftype: folder / MODEL_FILE for ftype, folder in folders.items() if folder.complete}


def make_from_scheme(
    reference: Reference,
    scheme: Scheme,
    imatrix: ImatrixStage,
    *,
    n_threads: int,
    on_tensor: OnTensor,
    split_max_size: int | None = None,
    feedback: Feedback | None = None,
) -> Quantized:
    """The file that ``scheme`` describes, or find it: one file, also where it is to be :func:`split` afterwards.

    With ``feedback`` where the scheme says so; without it the scheme's own is forgotten. Raises what
    :func:`check_scheme` does, and DoesNotFitError where shards of ``split_max_size`` bytes are too small; both first.
    """
    if feedback is None:
        scheme = replace(scheme, feedback="", feedback_except="")
    check_scheme(reference, scheme, imatrix)
    size = scheme_bytes(reference, scheme, imatrix)
    if split_max_size is not None and size > split_max_size:
        _check_shards(reference, scheme, imatrix, split_max_size)
    inputs = (reference, scheme, imatrix, feedback, n_threads, on_tensor)
    folder = scheme_folder(reference, scheme, imatrix)
    outcome = run_stage(folder, lambda folder: {"sha256": sha256_file(write_from_scheme(folder.path, *inputs))})
    return Quantized(folder / MODEL_FILE, size, scheme.types, outcome)


def write_from_scheme(
    folder: Path,
    reference: Reference,
    scheme: Scheme,
    imatrix: ImatrixStage,
    feedback: Feedback | None,
    n_threads: int,
    on_tensor: OnTensor,
) -> Path:
    """The file that a checked ``scheme`` describes, written into ``folder``, which must exist, whatever is there."""
    size = scheme_bytes(reference, scheme, imatrix)
    link_or_copy(imatrix.path, folder / IMATRIX_FILE)
    (folder / _SCHEME_FILE).write_text(render(scheme), encoding="utf-8")
    tools.write_tensor_types(scheme.types, folder / _TYPES_FILE)
    strings = scheme_metadata(sha256(scheme), imatrix.sha256, scheme.label, scheme.feedback)
    strings |= reference.provenance
    ftype, source = nearest_ftype(scheme.label), reference.path
    if feedback and scheme.feedback:
        source = folder / _ROUNDED_FILE
        plain = tensors_of(scheme.types, scheme.feedback_except.split())
        write_rounded(reference.header, scheme.types, plain, feedback, source, on_tensor)
    try:
        _run(source, folder, ftype, imatrix, n_threads, on_tensor, types=_TYPES_FILE, strings=strings)
    finally:
        (folder / _ROUNDED_FILE).unlink(missing_ok=True)
    _prove(folder / MODEL_FILE, reference.header, scheme.types, size)
    return folder / MODEL_FILE


def _check_shards(reference: Reference, scheme: Scheme, imatrix: ImatrixStage, max_bytes: int) -> None:
    tensors = reference.header.tensors
    largest = max(tensor_bytes(tensor, scheme.types.get(name, tensor.type)) for name, tensor in tensors.items())
    _shard_data_limit(_metadata_bytes(reference, imatrix, scheme.label), largest, max_bytes)


def check_scheme(reference: Reference, scheme: Scheme, imatrix: ImatrixStage | None = None) -> None:
    """Raise UsageError where ``scheme`` is of another architecture, leaves a tensor out, names one that the model has
    not, or gives one a type that does not fit its rows, or that needs an entry that ``imatrix`` has not.
    """
    check_architecture(scheme, reference.header.architecture, reference.path)
    tensors = quantizable(reference.header)
    if missing := set(tensors) - set(scheme.types):
        raise UsageError(f"the scheme gives no type to {min(missing)}", fix="make the scheme for this model")
    if unknown := set(scheme.types) - set(tensors):
        raise UsageError(f"the scheme names {min(unknown)}, which the model has not", fix="make it for this model")
    entries: Collection[str] = read_imatrix(imatrix.path).sums if imatrix else tensors
    wrong = [name for name, one in scheme.types.items() if candidate_types(tensors[name], [one], entries, {}) != [one]]
    if not wrong:
        return
    name, one = wrong[0], TENSOR_TYPES[scheme.types[wrong[0]]]
    row = tensors[name].shape[0]
    more = f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
    reason = (
        f"is for rows of multiples of {one.block_size}, not {row}" if not one.fits(row) else "needs an imatrix entry"
    )
    possible = candidate_types(tensors[name], DEFAULT_MENU, entries, {})
    near = sorted(possible, key=lambda name: abs(TENSOR_TYPES[name].bpw - one.bpw))[:3]
    raise UsageError(f"the scheme gives {name}{more} {one.name}, which {reason}", fix=f"give {', '.join(near)}")


def scheme_bytes(reference: Reference, scheme: Scheme, imatrix: ImatrixStage) -> int:
    """The exact size of the file that ``scheme`` describes."""
    types, tensors = scheme.types, reference.header.tensors
    return fixed_bytes(reference, imatrix, scheme.label) + sum(tensor_bytes(tensors[n], t) for n, t in types.items())


def scheme_folder(reference: Reference, scheme: Scheme, imatrix: ImatrixStage) -> StageFolder:
    """Where the file that ``scheme`` describes lies, made or not."""
    return stage_folder("quantize", {**_common_inputs(reference, imatrix), "scheme": sha256(scheme)})


def nearest_ftype(label: str) -> str:
    """The preset that a file of this label is declared as: its own name, or without ``_XL`` and other additions."""
    if label in STOCK_PRESETS:
        return label
    stem = {"Q2_K_XL": "Q2_K", "Q3_K_XL": "Q3_K_M", "Q4_K_XL": "Q4_K_M"}
    # general.file_type only informs; every tensor's type is given.
    return stem.get(label, "Q4_K_M")


def _common_inputs(reference: Reference, imatrix: ImatrixStage) -> dict[str, Any]:
    return {
        "reference": reference.sha256 + reference.quantized,
        "imatrix": imatrix.sha256,
        "llama_cpp": installation().commit,
        "dynrun": __version__,
    }


def _run(
    source: Path,
    folder: Path,
    ftype: str,
    imatrix: ImatrixStage,
    n_threads: int,
    on_tensor: OnTensor,
    *,
    types: str | None = None,
    strings: Mapping[str, str] | None = None,
) -> None:
    partial = folder / f"{MODEL_FILE}.part"
    try:
        tools.quantize(
            *(source, partial.name, ftype),
            folder=folder,
            n_threads=n_threads,
            imatrix=imatrix.path.name,
            tensor_type_file=types,
            strings=strings,
            on_tensor=on_tensor,
        )
        partial.replace(folder / MODEL_FILE)
    finally:
        # On a full disk all the room that there was.
        partial.unlink(missing_ok=True)


def _prove(path: Path, source: Header, types: Mapping[str, str], size_bytes: int) -> None:
    """Compare a new file with what was asked for; remove it where it differs."""
    header = read_header(path)
    finding = ""
    for name, tensor in source.tensors.items():
        wanted = types.get(name, tensor.type)
        got = header.tensors[name].type if name in header.tensors else "missing"
        if got != wanted:
            finding = f"{name} is {got} where {wanted} was asked for"
    if not finding and header.file_bytes != size_bytes:
        finding = f"it has {header.file_bytes} bytes where {size_bytes} were predicted"
    if finding:
        path.unlink()
        raise DynrunError(f"llama-quantize made another file than the scheme says: {finding}", fix="report this")


# -- shards ------------------------------------------------------------------------------------------------------------

# llama-gguf-split takes whole megabytes (of 10^6 bytes) and counts data alone.
_SPLIT_UNIT = 10**6
# What a shard has and the whole file has not: a preamble (24), split.no and split.count as uint16 (22 + 25),
# split.tensors.count as int32 (35), and padding behind the metadata (at most 31).
_SHARD_BYTES = 24 + 22 + 25 + 35 + 31


def shard_overhead_bytes(
    reference: Reference, imatrix: ImatrixStage, label: str, size_bytes: int, max_bytes: int
) -> int:
    """At most so many bytes do the shards of a file of at most ``size_bytes`` have more than the file itself.

    Raises DoesNotFitError where no shard of ``max_bytes`` can hold the metadata.
    """
    if size_bytes <= max_bytes:
        return 0
    limit = _shard_data_limit(_metadata_bytes(reference, imatrix, label), 1, max_bytes)
    return _most_shards(size_bytes, limit) * _SHARD_BYTES


def split(path: Path, out_prefix: Path, max_bytes: int) -> list[Path]:
    """Write the GGUF at ``path`` as shards of at most ``max_bytes`` each, ``out_prefix-00001-of-0000N.gguf``.

    A file that is no larger becomes ``out_prefix.gguf``, whole. The shards appear under their names when all of them
    are written and proved, the first one last: without it the others are no model. Raises DoesNotFitError where a
    tensor is larger than a shard, or the disk is too small.
    """
    header = read_header(path)
    whole = out_prefix.with_name(f"{out_prefix.name}.gguf")
    if header.file_bytes <= max_bytes:
        link_or_copy(path, whole)
        return [whole]
    if header.alignment != DEFAULT_ALIGNMENT:
        raise DynrunError(f"llama-gguf-split cannot split {path}, aligned to {header.alignment} bytes")
    largest = max(tensor_bytes(tensor, tensor.type) for tensor in header.tensors.values())
    limit = _shard_data_limit(header.data_offset, largest, max_bytes)
    with translated_os_errors(whole):
        out_prefix.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(out_prefix.parent).free < header.file_bytes:
            raise DoesNotFitError(
                f"the shards of {path.name} need {header.file_bytes:,} bytes in {out_prefix.parent}",
                fix="free some space, or name another folder",
            )
        # Beside the result, so that renaming moves no data.
        folder = Path(tempfile.mkdtemp(prefix=f".{out_prefix.name}.", suffix=".part", dir=out_prefix.parent))
        try:
            shards = tools.split_file(path, folder / "model", max_size=f"{limit // _SPLIT_UNIT}M")
            _prove_shards(shards, header, max_bytes, _most_shards(header.file_bytes, limit))
            return _publish(shards, out_prefix)
        finally:
            shutil.rmtree(folder)


def _shard_data_limit(metadata_bytes: int, largest: int, max_bytes: int) -> int:
    """The most data in a shard of ``max_bytes``, in whole units; ``largest``: bytes of the largest tensor.

    Raises DoesNotFitError: llama-gguf-split would give a larger tensor a shard that is larger too.
    """
    needed = -(-largest // _SPLIT_UNIT) * _SPLIT_UNIT + metadata_bytes + _SHARD_BYTES
    if max_bytes < needed:
        raise DoesNotFitError(
            f"shards of {max_bytes:,} bytes are too small for the metadata and the largest tensor",
            fix=f"the smallest possible --split-max-size is {needed}",
        )
    return (max_bytes - metadata_bytes - _SHARD_BYTES) // _SPLIT_UNIT * _SPLIT_UNIT


def _most_shards(size_bytes: int, limit: int) -> int:
    """A shard is closed by a tensor that it cannot hold, so any two neighbours have more than ``limit`` together."""
    return 1 + 2 * size_bytes // limit


def _prove_shards(shards: Iterable[Path], source: Header, max_bytes: int, most: int) -> None:
    headers = read_shards(min(shards))
    got = {name: (t.type, t.shape, t.nbytes) for header in headers for name, t in header.tensors.items()}
    total = sum(header.file_bytes for header in headers)
    finding = ""
    if got != {name: (t.type, t.shape, t.nbytes) for name, t in source.tensors.items()}:
        finding = "their tensors are not those of the file"
    elif any(header.file_bytes > max_bytes for header in headers):
        finding = f"one is larger than {max_bytes:,} bytes"
    elif len(headers) > most or total > source.file_bytes + len(headers) * _SHARD_BYTES:
        finding = f"{len(headers)} shards of {total:,} bytes are more than was predicted"
    if finding:
        raise DynrunError(
            f"llama-gguf-split made other shards than it should of {source.path}: {finding}", fix="report it"
        )


def _publish(shards: list[Path], prefix: Path) -> list[Path]:
    """Rename finished shards to what they are called; what an earlier run called so has no first one meanwhile."""
    names = [shard_path(prefix, number, len(shards)) for number in range(1, len(shards) + 1)]
    for shard in shards:
        with shard.open("r+b") as stream:
            os.fsync(stream.fileno())
    names[0].unlink(missing_ok=True)
    for shard, name in reversed(list(zip(sorted(shards), names, strict=True))):
        shard.replace(name)
    return names
