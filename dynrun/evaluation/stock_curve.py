"""The stock presets that files are compared with: which ones, and their files, all with one imatrix.

Takes a reference, an imatrix and the sizes to compare at, gives files by llama-quantize; measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dynrun.artifacts import MANIFEST, sha256_file
from dynrun.calibration.stage import ImatrixStage
from dynrun.errors import MALFORMED, UsageError
from dynrun.models import Reference
from dynrun.quantize import MODEL_FILE, STOCK_PRESETS, Preset, make_stock, stock_preset
from dynrun.target import presets_of

# On either side of a file's size: the nearest preset may be one that a smaller one beats.
_NEIGHBOURS = 2
# llama.cpp's first types, which newer ones of the same size beat: made only where they are asked for.
_LEGACY = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1"})


def chosen_presets(
    reference: Reference, imatrix: ImatrixStage, sizes: Iterable[int], labels: Sequence[str] = ()
) -> list[Preset]:
    """The presets of ``labels``, ``all`` of them, or without any those around the ``sizes``; by size.

    Raises UsageError for an unknown label, or fewer than two: they make no curve.
    """
    if labels and [label.lower() for label in labels] != ["all"]:
        if unknown := [label for label in labels if label.upper() not in STOCK_PRESETS]:
            raise UsageError(f"llama.cpp has no preset {unknown[0]!r}", fix=f"one of {', '.join(STOCK_PRESETS)}")
        presets = [stock_preset(reference, label.upper(), imatrix) for label in dict.fromkeys(labels)]
        if len(presets) < 2:
            raise UsageError("one preset makes no curve", fix="name two or more, or all")
        return sorted(presets, key=lambda preset: preset.size_bytes)
    presets = presets_of(reference, imatrix)
    if labels:
        return presets
    return around([preset for preset in presets if preset.ftype not in _LEGACY], sizes)


def around(presets: Sequence[Preset], sizes: Iterable[int]) -> list[Preset]:
    """The two presets on either side of every size, ``presets`` being in order of size; beyond their ends the last two.

    A preset of the very size counts on both sides.
    """
    kept: set[int] = set()
    for size in sizes:
        below = [i for i, preset in enumerate(presets) if preset.size_bytes <= size]
        above = [i for i, preset in enumerate(presets) if preset.size_bytes >= size]
        kept |= {*below[-_NEIGHBOURS:], *above[:_NEIGHBOURS]}
    return [presets[i] for i in sorted(kept)]


def make_curve(
    reference: Reference,
    presets: Sequence[Preset],
    imatrix: ImatrixStage,
    *,
    n_threads: int,
    on_preset: Callable[[Preset, int, int], None] = lambda *_: None,
) -> list[Path]:
    """The presets' files, made or found; ``on_preset`` gets each with its number, before it is made."""
    files = []
    for i, preset in enumerate(presets):
        on_preset(preset, i + 1, len(presets))
        made = make_stock(reference, preset, imatrix, n_threads=n_threads, on_tensor=lambda *_: None)
        files.append(made.path)
    return files


def imatrix_of_stock(path: Path) -> str | None:
    """The hash of the imatrix that a stock file was made with by :func:`make_curve`, in this cache; None for others.

    The file itself carries none: it is llama-quantize's, byte for byte.
    """
    try:
        manifest = json.loads((path.parent / MANIFEST).read_text(encoding="utf-8"))
        inputs, made = manifest["inputs"], manifest["result"]["sha256"]
    except (OSError, *MALFORMED):
        return None
    if path.name != MODEL_FILE or manifest.get("stage") != "stock" or made != sha256_file(path):
        return None
    known = inputs.get("imatrix")
    return known if isinstance(known, str) else None
