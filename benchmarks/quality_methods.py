"""Controls for benchmarks/quality.py: allocations that know nothing of the divergence.

Takes tensors, budgets and weights, gives a tensor type for each tensor; makes no file and measures no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dynrun.allocation.solve import Option, solve
from dynrun.artifacts import write_text
from dynrun.calibration.imatrix import Imatrix
from dynrun.errors import DoesNotFitError, DynrunError
from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp.library import ggml

Sizes = Mapping[str, Mapping[str, int]]
"""tensor → tensor type → bytes."""
Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.float32]

_WINDOW = 1.5
_MAX_MOVES = 20_000
_CHUNK_VALUES = 1 << 22
# As the product samples (dynrun/sensitivity/stage.py): 128 rows of 1,024 columns, more of shorter ones.
_SAMPLE_VALUES = 128 * 1024


def random_types(
    sizes: Sizes, n_elements: Mapping[str, int], budget_bytes: int, floor_bytes: int, seed: int
) -> dict[str, str]:
    """An allocation as somebody without information makes it: floor <= Σ bytes <= budget; the same seed, the same.

    Distribution: with b the budget's mean bits per weight over all these tensors, each tensor independently gets a
    type drawn uniformly from those of its own with b/1.5 <= bpw <= 1.5·b (where there is none, from its nearest). Then,
    until the size is right, a tensor drawn uniformly from those that can goes one size down (where the file is too
    large) or up (where it is too small and the step fits), its type drawn uniformly from those of that size; where it
    is too small and no step up fits, one goes down. So no tensor is starved or spoilt on purpose: the mean is the
    budget's and the spread about that of a stock preset. Raises DoesNotFitError where no allocation is in those bounds.
    """
    rng = np.random.default_rng(seed)
    target = 8 * budget_bytes / sum(n_elements[name] for name in sizes)
    chosen = {name: str(rng.choice(_near(list(sizes[name]), target))) for name in sorted(sizes)}
    total = sum(sizes[name][type_name] for name, type_name in chosen.items())
    possible = sum(max(types.values()) for types in sizes.values()) >= floor_bytes
    for _ in range(_MAX_MOVES if possible else 0):
        if floor_bytes <= total <= budget_bytes:
            return chosen
        moves = _moves(sizes, chosen, up=True, spare=budget_bytes - total) if total < floor_bytes else {}
        moves = moves or _moves(sizes, chosen, up=False, spare=0)
        if not moves:
            break
        name = sorted(moves)[rng.integers(len(moves))]
        new = str(rng.choice(moves[name]))
        total += sizes[name][new] - sizes[name][chosen[name]]
        chosen[name] = new
    raise DoesNotFitError(
        f"no random choice of tensor types has {floor_bytes:,} to {budget_bytes:,} bytes", fix="take another label"
    )


def _near(types: Sequence[str], target: float) -> list[str]:
    """The types within the window around ``target`` bits per weight, or those nearest to it."""
    distance = {name: abs(math.log(TENSOR_TYPES[name].bpw / target)) for name in types}
    least = max(min(distance.values()), math.log(_WINDOW))
    return [name for name in types if distance[name] <= least * (1 + 1e-12)]


def _moves(sizes: Sizes, chosen: Mapping[str, str], *, up: bool, spare: int) -> dict[str, list[str]]:
    """For each tensor the types one size up (that cost at most ``spare`` bytes more) or down."""
    found = {}
    for name, types in sizes.items():
        now = types[chosen[name]]
        beyond = [size for size in types.values() if (now < size <= now + spare if up else size < now)]
        if beyond:
            step = min(beyond) if up else max(beyond)
            found[name] = [type_name for type_name, size in types.items() if size == step]
    return found


@dataclass(frozen=True)
class SquaredErrors:
    """Of one tensor, for each type: ``absolute`` Σ h·(w−q)² over all entries, h the mean of x² of the input column (1
    where the imatrix has none); ``by_row`` the sum over all rows of Σ h·(w−q)² / Σ h·w²."""

    absolute: dict[str, float]
    by_row: dict[str, float]


def squared_errors(
    weights: WeightFile, imatrix: Imatrix, name: str, types: Sequence[str], n_threads: int
) -> SquaredErrors:
    """Measured on evenly spaced rows (of every expert, at least 2), extended to the tensor.

    ``absolute`` is the sampled rows' Σ h·(w−q)² / Σ h·w² times Σ h·w² of all rows, expert by expert.
    """
    ne0 = weights.header.tensors[name].shape[0]
    mean = imatrix.mean(name)
    importance = np.ones((1, ne0), dtype=np.float32) if mean is None else mean.astype(np.float32)
    per_expert = weights.n_rows(name) // len(importance)
    each = min(per_expert, max(2, _SAMPLE_VALUES // ne0 // len(importance)))
    offsets = ((np.arange(each) + 0.5) * per_expert / each).astype(np.int64)
    samples = [weights.rows(name, e * per_expert + offsets) for e in range(len(importance))]
    energies = weighted_energy(weights, importance, name)

    def work(type_name: str) -> tuple[float, float]:
        absolute = by_row = 0.0
        for rows, h, energy in zip(samples, importance, energies.tolist(), strict=True):
            quantized = _round_trip(type_name, rows, None if mean is None else h)
            lost = np.square(rows.astype(np.float64) - quantized) @ h.astype(np.float64)
            whole = np.square(rows.astype(np.float64)) @ h.astype(np.float64)
            absolute += energy * float(lost.sum() / whole.sum()) if whole.sum() > 0 else 0.0
            by_row += per_expert * float(np.divide(lost, whole, out=np.zeros_like(lost), where=whole > 0).mean())
        return absolute, by_row

    with ThreadPoolExecutor(n_threads) as pool:
        found = dict(zip(types, pool.map(work, types), strict=True))
    return SquaredErrors({t: a for t, (a, _) in found.items()}, {t: r for t, (_, r) in found.items()})


def weighted_energy(weights: WeightFile, importance: Rows, name: str) -> Floats:
    """Σ h·w² of each expert, [n_expert], with ``importance`` h [n_expert, ne0]; read some rows at a time."""
    per_expert, step = weights.n_rows(name) // len(importance), max(1, _CHUNK_VALUES // importance.shape[1])
    energies = np.zeros(len(importance))
    for expert, h in enumerate(importance):
        for start in range(expert * per_expert, (expert + 1) * per_expert, step):
            rows = weights.rows(name, slice(start, min(start + step, (expert + 1) * per_expert)))
            energies[expert] += float((np.square(rows.astype(np.float64)) @ h.astype(np.float64)).sum())
    return energies


def _round_trip(type_name: str, rows: Rows, importance: Rows | None) -> Rows:
    if type_name == "F16":
        return rows.astype(np.float16).astype(np.float32)
    library, type_id = ggml(), TENSOR_TYPES[type_name].ggml_id
    library.ggml_quantize_init(type_id)
    return library.dequantize(type_id, library.quantize(type_id, rows, importance), *rows.shape)


def all_squared_errors(
    weights: WeightFile, imatrix: Imatrix, types: Mapping[str, Sequence[str]], path: Path, n_threads: int
) -> dict[str, SquaredErrors]:
    """Of every tensor in ``types``; a line a tensor is kept in ``path``, so that a killed run goes on."""
    found = _read(path)
    with path.open("a", encoding="utf-8") as stream:
        for name, candidates in types.items():
            if name not in found:
                found[name] = squared_errors(weights, imatrix, name, candidates, n_threads)
                stream.write(json.dumps([name, asdict(found[name])]) + "\n")
                stream.flush()
    return {name: found[name] for name in types}


def _read(path: Path) -> dict[str, SquaredErrors]:
    """Whole lines only: the last one may be torn by a kill."""
    if not path.is_file():
        return {}
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    write_text(path, "".join(lines))
    return {name: SquaredErrors(**errors) for name, errors in map(json.loads, lines)}


def least_squares_types(
    sizes: Sizes, errors: Mapping[str, SquaredErrors], budget_bytes: int, *, by_row: bool
) -> dict[str, str]:
    """The allocation with the least Σ of weighted squared errors within the budget, solved exactly.

    The signal is that of llama.cpp PR 15550 (--target-bpw, function target_bpw_type of its src/llama-quant.cpp): the
    imatrix and the weights alone, no forward pass. Two units: ``absolute`` (``by_row`` false), the squared error of the
    outputs summed over the tensor, and ``by_row``, as the PR divides: each row's error by its own Σ h·w².
    The PR does otherwise: to each row it adds a bias term, the squared projection of w−q on the mean activations, where
    the imatrix has those (llama-imatrix's and ours have none, and the term is absent there too); it relaxes by a
    Lagrangian where this solves to a gap; its menu is k-quants or IQ types by the base preset, here the product's.
    Later versions take a cosine error for q and k and scale by statistics of the activations. Raises DoesNotFitError.
    """
    options = {}
    for name, types in sizes.items():
        costs = errors[name].by_row if by_row else errors[name].absolute
        options[name] = [Option(type_name, size, costs[type_name]) for type_name, size in types.items()]
    solution = solve(options, budget_bytes)
    if solution.nbytes > budget_bytes:
        raise DynrunError("the weighted-MSE allocation is over its budget", fix="report this")
    return dict(solution.types)
