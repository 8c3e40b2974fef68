"""The importance matrix: Σx² per input column of every weight, in llama.cpp's GGUF format.

Takes and gives files and arrays: ours, llama-imatrix's and its legacy ``.dat``; collects nothing (collect.py).
Format as tools/imatrix/imatrix.cpp writes it: F32 tensors ``<weight>.in_sum2`` [ne0, n_expert], raw sums, and
``<weight>.counts`` [1, n_expert], the number of inputs summed. An expert that saw nothing is stored as zeros. Where
experts.py has mixed an expert with its layer, its own tokens are in the metadata, in ``dynrun.expert_tokens.<weight>``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFValueType, GGUFWriter

from dynrun.artifacts import atomic_path
from dynrun.calibration.legacy_imatrix import LEGACY_CHUNK_SIZE, read_legacy
from dynrun.errors import DynrunError, NotFoundError, UsageError
from dynrun.gguf.header import Header, TensorInfo, read_header
from dynrun.gguf.quantizable import quantizable

Sums = npt.NDArray[np.float64]
_SUMS, _COUNTS = ".in_sum2", ".counts"
_SEEN, _ESTIMATED = "dynrun.expert_tokens.", "dynrun.estimated_counts"
_FIX = "make one with `dynrun imatrix`"


@dataclass(frozen=True)
class Imatrix:
    """``sums[weight]`` [n_expert, ne0], ``counts[weight]`` [n_expert]; n_expert is 1 for dense weights.

    ``seen``: the tokens that each expert did see, other than ``counts`` where it got its layer's mean (shrink_experts);
    ``datasets``, ``chunk_count`` sequences of up to ``chunk_size`` tokens: where it comes from, as far as is known;
    ``estimated``: counts are from legacy files, which hold one for all experts of a weight.
    """

    sums: Mapping[str, Sums]
    counts: Mapping[str, Sums]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0
    seen: Mapping[str, Sums] = field(default_factory=dict)
    estimated: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "seen", {**self.counts, **self.seen})

    def mean(self, weight: str) -> Sums | None:
        """Mean of x² per input column, [n_expert, ne0]; None where the weight has no entry.

        Experts that saw nothing get ones, as llama-quantize gives them.
        """
        if weight not in self.sums:
            return None
        counts = self.counts[weight][:, None]
        return np.where(counts > 0, self.sums[weight] / np.maximum(counts, 1), 1.0)


def write_imatrix(
    imatrix: Imatrix,
    path: Path,
    *,
    dataset: str | None = None,
    chunk_count: int | None = None,
    chunk_size: int | None = None,
) -> None:
    """Write ``path`` atomically; what is given replaces the imatrix's own dataset names, chunk count and chunk size.

    The same imatrix gives the same bytes.
    """
    datasets = list(imatrix.datasets) if dataset is None else [dataset]
    with atomic_path(path) as temporary:
        writer = GGUFWriter(str(temporary), "")
        # The writer names an architecture; an imatrix has none.
        writer.kv_data[0].pop("general.architecture", None)
        writer.add_type("imatrix")
        # llama-quantize refuses a file without this key, and the writer cannot write an empty array.
        writer.add_array("imatrix.datasets", datasets or [""])
        writer.add_uint32("imatrix.chunk_count", imatrix.chunk_count if chunk_count is None else chunk_count)
        writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size if chunk_size is None else chunk_size)
        if imatrix.estimated:
            writer.add_bool(_ESTIMATED, True)
        for name in sorted(imatrix.sums):
            if not np.array_equal(imatrix.seen[name], imatrix.counts[name]):
                tokens = imatrix.seen[name].tolist()
                writer.add_key_value(_SEEN + name, tokens, GGUFValueType.ARRAY, GGUFValueType.FLOAT64)
            writer.add_tensor(name + _SUMS, imatrix.sums[name].astype(np.float32))
            writer.add_tensor(name + _COUNTS, imatrix.counts[name].astype(np.float32)[:, None])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_imatrix(path: Path) -> Imatrix:
    """Read an imatrix in GGUF format, ours or llama-imatrix's.

    Raises NotFoundError where there is no file, DynrunError for anything that is no whole and sound imatrix.
    """
    try:
        header = read_header(path)
    except NotFoundError:
        raise
    except DynrunError as error:
        raise DynrunError(f"{path} is no imatrix: it {error.message.removeprefix(f'{path} ')}", fix=_FIX) from error
    kind, names = header.metadata.get("general.type", "imatrix"), _names(header)
    if kind != "imatrix" or not names:
        raise DynrunError(f"{path} is a GGUF of type {kind!r:.40} with {len(names)} entries, no imatrix", fix=_FIX)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    entries = {name: _entry(header, name, data) for name in names}
    datasets = header.metadata.get("imatrix.datasets")
    return Imatrix(
        {name: sums for name, (sums, _) in entries.items()},
        {name: counts for name, (_, counts) in entries.items()},
        tuple(str(one) for one in datasets if one) if isinstance(datasets, list) else (),
        _whole_number(header.metadata.get("imatrix.chunk_count")),
        _whole_number(header.metadata.get("imatrix.chunk_size")),
        {name: _seen(header, name, entries[name][1]) for name in names if _SEEN + name in header.metadata},
        header.metadata.get(_ESTIMATED) is True,
    )


def _names(header: Header) -> list[str]:
    """The weights that have sums. Raises DynrunError for counts without them."""
    names = [name.removesuffix(_SUMS) for name in header.tensors if name.endswith(_SUMS)]
    counted = {name.removesuffix(_COUNTS) for name in header.tensors if name.endswith(_COUNTS)}
    if lone := sorted(counted.difference(names)):
        raise _damaged(header.path, lone[0], "has counts and no sums")
    return names


def _damaged(path: Path, name: str, what: str) -> DynrunError:
    return DynrunError(f"the imatrix {path} is damaged: its entry {name!r:.80} {what}", fix="download or make it again")


def _whole_number(value: Any) -> int:
    return value if type(value) is int and 0 < value < 1 << 32 else 0


def _entry(header: Header, name: str, data: npt.NDArray[np.uint8]) -> tuple[Sums, Sums]:
    """Sums [n_expert, ne0] and counts [n_expert] of one weight, checked."""
    tensors = header.tensors
    if name + _COUNTS not in tensors:
        raise _damaged(header.path, name, "has sums and no counts")
    given = tensors[name + _SUMS]
    for tensor in (given, tensors[name + _COUNTS]):
        if tensor.type != "F32":
            raise _damaged(header.path, name, f"is {tensor.type}, not F32")
    raw, counts = _values(header, given, data), _values(header, tensors[name + _COUNTS], data)
    width, rest = divmod(raw.size, len(counts))
    # One count for several matrices is how llama-imatrix writes a dense weight of three dimensions.
    if rest or (len(counts) > 1 and given.shape[0] != width):
        raise _damaged(header.path, name, f"has sums of shape {list(given.shape)} and {len(counts)} counts")
    for what, values in (("sums", raw), ("counts", counts)):
        if not np.isfinite(values).all() or values.min() < 0:
            raise _damaged(header.path, name, f"has {what} that are not finite or negative")
    # Rounded as by common/imatrix-loader.cpp.
    return raw.reshape(len(counts), width), np.rint(counts)


def _values(header: Header, tensor: TensorInfo, data: npt.NDArray[np.uint8]) -> Sums:
    start = header.data_offset + tensor.offset
    return np.array(data[start : start + tensor.nbytes]).view("<f4").astype(np.float64)


def _seen(header: Header, name: str, counts: Sums) -> Sums:
    given = header.metadata[_SEEN + name]
    if not isinstance(given, list) or not all(isinstance(n, int | float) for n in given):
        raise _damaged(header.path, name, f"has {_SEEN}* that is no list of numbers")
    seen = np.array(given, dtype=np.float64)
    # A NaN fails both comparisons.
    if seen.shape != counts.shape or not ((seen >= 0) & (seen <= counts)).all():
        raise _damaged(header.path, name, f"has {_SEEN}* that does not fit its counts")
    return seen


# -- files of others ---------------------------------------------------------------------------------------------------


def load_imatrix(path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Imatrix:
    """Read an imatrix of any origin, GGUF or legacy ``.dat``, for the model whose tensors have ``shapes`` (ggml order).

    Entries of legacy files are [1, ne0 × n_expert] until ``shapes`` tell how many experts there are. Raises UsageError
    if it was made for another model: an entry's shape differs, or none is of this model; DynrunError and NotFoundError
    like :func:`read_imatrix`.
    """
    imatrix = read_imatrix(path) if _is_gguf(path) else _from_legacy(path)
    return imatrix if shapes is None else _fitted(imatrix, path, shapes)


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist", fix="check the path")
    try:
        with path.open("rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError as error:
        raise DynrunError(f"{path} cannot be read: {error.strerror}", fix="check its permissions") from error


def _from_legacy(path: Path) -> Imatrix:
    """As IMatrixCollector::load_imatrix (tools/imatrix/imatrix.cpp): a call counts for a chunk of 512 tokens."""
    legacy = read_legacy(path)
    # llama-quantize takes the values of an entry without calls as they are: as means.
    tokens = {name: float(LEGACY_CHUNK_SIZE * max(entry.n_calls, 1)) for name, entry in legacy.entries.items()}
    return Imatrix(
        {name: LEGACY_CHUNK_SIZE * entry.values[None].astype(np.float64) for name, entry in legacy.entries.items()},
        {name: np.array([n]) for name, n in tokens.items()},
        (legacy.dataset,) if legacy.dataset else (),
        legacy.chunk_count,
        LEGACY_CHUNK_SIZE,
        estimated=True,
    )


def _fitted(imatrix: Imatrix, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Imatrix:
    """The same with every entry that is of the model in its shape."""
    sums, counts, seen = dict(imatrix.sums), dict(imatrix.counts), dict(imatrix.seen)
    other, fix = f"{path} was made for another model", "give the imatrix of this model"
    matching = [name for name in sums if name in shapes]
    if not matching:
        raise UsageError(f"{other}: none of its {len(sums)} entries is a weight of this one", fix=fix)
    for name in matching:
        width, n_expert = shapes[name][0], int(np.prod(shapes[name][2:], dtype=np.int64))
        if sums[name].size != width * n_expert or len(counts[name]) not in (1, n_expert):
            found = list(sums[name].shape)
            raise UsageError(f"{other}: its entry {name!r:.80} is {found}, here {[n_expert, width]} is wanted", fix=fix)
        if len(counts[name]) < n_expert:
            sums[name], counts[name] = _split(sums[name], counts[name], n_expert, legacy=imatrix.estimated)
            seen[name] = counts[name]
    return replace(imatrix, sums=sums, counts=counts, seen=seen)


def _split(sums: Sums, counts: Sums, n_expert: int, *, legacy: bool) -> tuple[Sums, Sums]:
    """A flat entry as one row and one count per matrix.

    save_imatrix_legacy writes a mean of exactly one throughout for an expert that saw nothing: here it is nothing again
    (llama-quantize takes ones all the same).
    """
    rows, each = sums.reshape(n_expert, -1), np.repeat(counts, n_expert)
    unseen = (rows == each[:, None]).all(axis=1) & legacy
    return np.where(unseen[:, None], 0.0, rows), np.where(unseen, 0.0, each)


def missing_entries(imatrix: Imatrix, header: Header) -> list[str]:
    """The tensors that llama-quantize would quantize and the imatrix knows nothing of, in the model's order.

    ``token_embd.weight`` is not among them: it is looked up, no input multiplies it.
    """
    names = (name for name in quantizable(header) if name != "token_embd.weight")
    return [name for name in names if name not in imatrix.counts or not imatrix.counts[name].any()]


# -- putting them together ---------------------------------------------------------------------------------------------


def unshrunk(imatrix: Imatrix) -> Imatrix:
    """The raw sums, without what shrink_experts added, to the rounding of the file that they were read from.

    With R the raw total over experts, N its tokens and D the pseudo-tokens added, the total is R + D·R/N.
    """
    sums, counts = dict(imatrix.sums), dict(imatrix.counts)
    for name, seen in imatrix.seen.items():
        added = counts[name] - seen
        if not added.any() or not seen.any():
            continue
        n = seen.sum()
        layer = sums[name].sum(axis=0) / (n + added.sum())
        raw = np.maximum(sums[name] - added[:, None] * layer, 0)
        sums[name], counts[name] = np.where(seen[:, None] > 0, raw, 0.0), seen
    return replace(imatrix, sums=sums, counts=counts, seen={})


def merge(imatrices: Sequence[Imatrix]) -> Imatrix:
    """Sums and counts of all added up, without what shrink_experts added; entries that only some have are kept.

    As llama-imatrix combines files (IMatrixCollector::load_imatrix): legacy ones count for 512 tokens a call, and one
    count for all experts is a count for each. Raises UsageError naming an entry whose shapes differ.
    """
    if not imatrices:
        raise UsageError("there is no imatrix to merge", fix="give at least one")
    n_expert: dict[str, int] = {}
    for one in imatrices:
        for name, counts in one.counts.items():
            n_expert[name] = max(n_expert.get(name, 1), len(counts))
    sums: dict[str, Sums] = {}
    totals: dict[str, Sums] = {}
    for one in map(unshrunk, imatrices):
        for name in one.sums:
            rows, counts = _of_experts(one, name, n_expert[name])
            if name in sums and sums[name].shape != rows.shape:
                raise _unlike(name, sums[name].shape, rows.shape)
            sums[name] = sums[name] + rows if name in sums else rows
            totals[name] = totals[name] + counts if name in totals else counts
    return Imatrix(
        sums,
        totals,
        tuple(dict.fromkeys(dataset for one in imatrices for dataset in one.datasets)),
        sum(one.chunk_count for one in imatrices),
        max(one.chunk_size for one in imatrices),
        estimated=any(one.estimated for one in imatrices),
    )


def _of_experts(imatrix: Imatrix, name: str, n_expert: int) -> tuple[Sums, Sums]:
    sums, counts = imatrix.sums[name], imatrix.counts[name]
    if len(counts) == n_expert:
        return sums, counts
    if len(counts) != 1 or sums.size % n_expert:
        raise _unlike(name, sums.shape, (n_expert, "…"))
    return _split(sums, counts, n_expert, legacy=imatrix.estimated)


def _unlike(name: str, one: tuple[Any, ...], other: tuple[Any, ...]) -> UsageError:
    shapes = " and ".join(str(list(shape)).replace("'", "") for shape in (one, other))
    return UsageError(
        f"the imatrices are of different models: {name!r:.80} has shapes {shapes}", fix="merge those of one model"
    )
