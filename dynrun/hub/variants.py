"""What the GGUFs of a repository are: quants in one file or many, and what goes beside a model.

Takes paths, looks into no file. Companions are told by their names as llama.cpp does it (common/download.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice

from dynrun.errors import DynrunError, NotFoundError, UsageError
from dynrun.hub.files import RemoteFile, Shelf, Variant

MMPROJ, MTP, IMATRIX = "mmproj", "mtp", "imatrix"
UNSLOTH_DYNAMIC = "UD-"
_MOST_MISSING = 20
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.DOTALL)
_COMPANIONS = {
    MMPROJ: MMPROJ,
    IMATRIX: IMATRIX,
    MTP: "mtp-",
    "eagle3": "eagle3-",
    "dflash": "dflash-",
    "dspark": "dspark-",
}
# A type of llama.cpp with what quantizers append (Q4_K_XL, Q4_0_4_4), full precision, or dynrun's bits per weight;
# between delimiters, so that no label is found inside of another one.
_LABEL = re.compile(
    r"(?<![A-Za-z0-9])(?:UD-)?(?:I?Q\d+(?:_[A-Z0-9]{1,3})*|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|BF16|F16|FP16|F32|FP32|"
    r"\d+(?:\.\d+)?BPW)(?![A-Za-z0-9])",
    re.IGNORECASE,
)


def shelve(files: Sequence[RemoteFile]) -> Shelf:
    """The quants and companions among ``files``, the smallest first."""
    groups: dict[tuple[str, int], list[tuple[int, RemoteFile]]] = {}
    for file in files:
        if file.name.endswith(".gguf"):
            stem, number, count = _shard(file.path.removesuffix(".gguf"))
            groups.setdefault((stem, count), []).append((number, file))
    quants: list[Variant] = []
    companions: dict[str, list[Variant]] = {}
    for (stem, count), shards in groups.items():
        shards.sort(key=lambda shard: shard[0])
        here = {number for number, _ in shards}
        # A name may speak of 99,999 shards: the first that lack say enough.
        missing = tuple(islice((number for number in range(1, count + 1) if number not in here), _MOST_MISSING))
        variant = Variant(label_of_path(stem), tuple(file for _, file in shards), missing)
        kind = companion_kind(stem)
        (companions.setdefault(kind, []) if kind else quants).append(variant)
    return Shelf(_by_size(quants), {kind: _by_size(found) for kind, found in companions.items()})


def label_of_path(stem: str) -> str:
    """The quant that a path (without ``.gguf`` and shard number) names, in its file or else its folder; or the file.

    The last one counts: what stands before it is the model's own name.
    """
    folder, _, name = stem.rpartition("/")
    for part in (name, folder.rpartition("/")[2]):
        if found := _LABEL.findall(part):
            label: str = found[-1]
            return _spelled(label)
    return name


def companion_kind(path: str) -> str:
    """``mmproj``, ``mtp`` or another draft's kind, ``imatrix``; empty for a model."""
    name = path.rpartition("/")[2]
    return next((kind for kind, mark in _COMPANIONS.items() if mark in name), "")


def choose(shelf: Shelf, wanted: str, where: str) -> Variant:
    """The quant of ``shelf`` that ``wanted`` names: a label in any case, a file, or nothing where there is only one.

    A label matches exactly, then with the prefix ``UD-``, never as a part of another. ``where`` is what holds the
    shelf, for messages. Raises NotFoundError for an unknown one, AmbiguousError where several match, DynrunError where
    shards are missing.
    """
    if not (found := matching(shelf, wanted)):
        kinds = ", ".join(dict.fromkeys(variant.label for variant in shelf.quants))
        raise NotFoundError(f"{where} has no quant {wanted}", fix=f"it has: {kinds or 'no GGUF'}")
    if len(found) > 1:
        raise AmbiguousError(where, found, by_label=not wanted)
    (variant,) = found
    if variant.missing:
        lacking = ", ".join(map(str, variant.missing))
        raise DynrunError(
            f"{where} lacks shards {lacking} of {variant.label}", fix="choose another quant, or ask its owner"
        )
    return variant


def matching(shelf: Shelf, wanted: str) -> list[Variant]:
    """The quants that ``wanted`` may mean; all of them where it is empty."""
    if not wanted:
        return list(shelf.quants)
    everything = [*shelf.quants, *(v for group in shelf.companions.values() for v in group)]
    if by_file := [v for v in everything if wanted in {name for f in v.files for name in (f.path, f.name)}]:
        return by_file[:1]
    label = _spelled(wanted)
    for spelling in (label, UNSLOTH_DYNAMIC + label):
        if found := [v for v in shelf.quants if v.label == spelling or v.label == wanted]:
            return found
    return []


class AmbiguousError(UsageError):
    """Several quants answer to what was asked for; ``found`` are they."""

    def __init__(self, where: str, found: Sequence[Variant], *, by_label: bool) -> None:
        self.found = tuple(found)
        names = [variant.label if by_label else variant.first.path for variant in found]
        how = "choose one with --quant, or as MODEL:QUANT" if by_label else "name the file, as in MODEL:FILE"
        super().__init__(f"{where} has several: {', '.join(dict.fromkeys(names))}", fix=how)


def best_companion(shelf: Shelf, kind: str, variant: Variant) -> Variant | None:
    """The companion of ``kind`` to offer beside ``variant``: in its folder or above, F16 before others, then small."""
    folder = variant.first.path.rpartition("/")[0]
    found = [v for v in shelf.companions.get(kind, ()) if not v.missing and _above(v.first.path, folder)]
    order = ("F16", "BF16", "Q8_0") if kind == MMPROJ else (variant.label, "Q8_0")
    return min(found, key=lambda v: order.index(v.label) if v.label in order else len(order), default=None)


def _above(path: str, folder: str) -> bool:
    own = path.rpartition("/")[0]
    return own in ("", folder) or folder.startswith(f"{own}/")


def _shard(stem: str) -> tuple[str, int, int]:
    match = _SHARD.fullmatch(stem)
    return (match["stem"], int(match["number"]), int(match["count"])) if match else (stem, 1, 1)


def _spelled(label: str) -> str:
    upper = label.upper().replace("BPW", "bpw")
    return {"FP16": "F16", "FP32": "F32"}.get(upper, upper)


def _by_size(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    return tuple(sorted(variants, key=lambda variant: (variant.size, variant.first.path)))
