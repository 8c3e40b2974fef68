"""From a scheme, or a stock preset, to a GGUF, by llama-quantize; read back and proved before anybody sees it.

Gives a file whose every tensor has exactly the type that was asked for and whose size is the one predicted, to the
byte. Rounds nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrun import __version__
from dynrun.artifacts import Outcome, StageFolder, link_or_copy, run_stage, sha256_file, stage_folder
from dynrun.calibration.stage import IMATRIX_FILE, ImatrixStage
from dynrun.errors import DynrunError, UsageError
from dynrun.gguf.header import Header, read_header
from dynrun.gguf.layout import metadata_bytes, quantized_file_bytes, tensor_bytes
from dynrun.gguf.quant_label import FTYPES
from dynrun.gguf.quantizable import quantizable
from dynrun.llamacpp import tools
from dynrun.llamacpp.build import installation
from dynrun.models import Reference
from dynrun.scheme import Scheme, check_architecture, render, sha256

MODEL_FILE = "model.gguf"
_TYPES_FILE = "tensor-types.txt"
_SCHEME_FILE = "scheme.toml"
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


def scheme_metadata(scheme_sha256: str, imatrix_sha256: str, label: str) -> dict[str, str]:
    """What dynrun writes into a file's metadata; of the same length for every scheme of one label."""
    return {
        "dynrun.version": __version__,
        "dynrun.label": label,
        "dynrun.scheme.sha256": scheme_sha256,
        "dynrun.imatrix.sha256": imatrix_sha256,
    }


def fixed_bytes(reference: Reference, imatrix: ImatrixStage, label: str) -> int:
    """Bytes of a file made by a scheme that no choice of types changes: metadata and unquantized tensors."""
    strings, numbers = _imatrix_metadata(imatrix)
    strings |= scheme_metadata("0" * 64, "0" * 64, label)
    chosen = quantizable(reference.header)
    kept = sum(tensor_bytes(t, t.type) for name, t in reference.header.tensors.items() if name not in chosen)
    return metadata_bytes(reference.header, strings, numbers) + kept


def make_stock(
    reference: Reference, preset: Preset, imatrix: ImatrixStage, *, n_threads: int, on_tensor: OnTensor
) -> Quantized:
    """The stock preset's file, with the imatrix, or find it."""

    def work(folder: StageFolder) -> Mapping[str, Any]:
        link_or_copy(imatrix.path, folder / IMATRIX_FILE)
        _run(reference, folder, preset.ftype, imatrix, n_threads, on_tensor)
        _prove(folder / MODEL_FILE, reference.header, preset.types, preset.size_bytes)
        return {"sha256": sha256_file(folder / MODEL_FILE)}

    folder = stage_folder("stock", {**_common_inputs(reference, imatrix), "ftype": preset.ftype})
    outcome = run_stage(folder, work)
    return Quantized(folder / MODEL_FILE, preset.size_bytes, preset.types, outcome)


def make_from_scheme(
    reference: Reference, scheme: Scheme, imatrix: ImatrixStage, *, n_threads: int, on_tensor: OnTensor
) -> Quantized:
    """The file that ``scheme`` describes, or find it.

    Raises UsageError where the scheme is of another architecture or leaves a tensor out.
    """
    check_architecture(scheme, reference.header.architecture, reference.path)
    missing = set(quantizable(reference.header)) - set(scheme.types)
    if missing:
        raise UsageError(f"the scheme gives no type to {min(missing)}", fix="make the scheme for this model")
    size = scheme_bytes(reference, scheme, imatrix)

    def work(folder: StageFolder) -> Mapping[str, Any]:
        link_or_copy(imatrix.path, folder / IMATRIX_FILE)
        (folder / _SCHEME_FILE).write_text(render(scheme), encoding="utf-8")
        tools.write_tensor_types(scheme.types, folder / _TYPES_FILE)
        strings = scheme_metadata(sha256(scheme), imatrix.sha256, scheme.label)
        ftype = nearest_ftype(scheme.label)
        _run(reference, folder, ftype, imatrix, n_threads, on_tensor, types=_TYPES_FILE, strings=strings)
        _prove(folder / MODEL_FILE, reference.header, scheme.types, size)
        return {"sha256": sha256_file(folder / MODEL_FILE)}

    folder = scheme_folder(reference, scheme, imatrix)
    outcome = run_stage(folder, work)
    return Quantized(folder / MODEL_FILE, size, scheme.types, outcome)


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
        "reference": reference.sha256,
        "imatrix": imatrix.sha256,
        "llama_cpp": installation().commit,
        "dynrun": __version__,
    }


def _run(
    reference: Reference,
    folder: StageFolder,
    ftype: str,
    imatrix: ImatrixStage,
    n_threads: int,
    on_tensor: OnTensor,
    *,
    types: str | None = None,
    strings: Mapping[str, str] | None = None,
) -> None:
    partial = f"{MODEL_FILE}.part"
    tools.quantize(
        reference.path,
        partial,
        ftype,
        folder=folder.path,
        n_threads=n_threads,
        imatrix=imatrix.path.name,
        tensor_type_file=types,
        strings=strings,
        on_tensor=on_tensor,
    )
    (folder / partial).replace(folder / MODEL_FILE)


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
