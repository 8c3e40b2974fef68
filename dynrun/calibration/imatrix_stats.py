"""What ``llama-imatrix --show-statistics`` computes, as plain data.

Takes an imatrix, gives a row per weight and a row per layer; prints nothing. Definitions are those of
compute_statistics, compute_cossim and show_statistics in tools/imatrix/imatrix.cpp, its plain float32 summation
included: on large expert tensors its rounding shows in what is printed. Coverage of experts is in experts.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynrun.calibration.imatrix import Imatrix

Column = npt.NDArray[np.float32]
# A column whose mean x² is at most this counts as inactive.
_INACTIVE = np.float32(1e-5)


@dataclass(frozen=True)
class TensorStatistics:
    """Of the mean x² of one weight's input columns, all experts with tokens together; shares are 0 to 1.

    ``total`` (the tool's Σ(Act²)), ``least``, ``greatest``, ``mean``, ``stddev``; ``active``: share of columns above
    1e-5; ``n``: number of columns; ``entropy`` in bits, ``entropy_share`` of log2(n); ``zd``: share of columns more
    than a standard deviation above the mean; ``cos_sim``: cosine of the raw sums with those of the same weight one
    block earlier, 0 where there is none. ``block`` is None outside the blocks; ``tensor`` is the weight's kind.
    """

    weight: str
    block: int | None
    tensor: str
    total: float
    least: float
    greatest: float
    mean: float
    stddev: float
    active: float
    n: int
    entropy: float
    entropy_share: float
    zd: float
    cos_sim: float


@dataclass(frozen=True)
class LayerStatistics:
    """Means over a block's weights, weighted by their number of columns."""

    block: int
    total: float
    zd: float
    cos_sim: float


def statistics(imatrix: Imatrix) -> list[TensorStatistics]:
    """A row per weight that saw any token, ordered as the tool prints them: by kind, the greatest total first."""
    used = [name for name, counts in imatrix.counts.items() if counts.any()]
    rows = [_row(imatrix, name, set(used)) for name in used]
    return sorted(rows, key=lambda row: (row.tensor, -row.total, row.weight))


def layer_statistics(rows: Sequence[TensorStatistics]) -> list[LayerStatistics]:
    """A row per block; weights outside the blocks are left out, as by the tool."""
    found = []
    for block in sorted({row.block for row in rows if row.block is not None}):
        mine = [row for row in rows if row.block == block]
        n = np.array([row.n for row in mine], dtype=np.float64)
        values = np.array([(row.total, row.zd, row.cos_sim) for row in mine])
        total, zd, cos_sim = (n @ values / n.sum()).tolist()
        found.append(LayerStatistics(block, total, zd, cos_sim))
    return found


def block_and_kind(weight: str) -> tuple[int | None, str]:
    """Block and kind of a weight by its name, as process_tensor_name has them: (3, "attn_q")."""
    parts = weight.split(".")
    after = parts[parts.index("blk") + 1 : parts.index("blk") + 2] if "blk" in parts else []
    block = int(after[0]) if after and re.fullmatch(r"\d{1,9}", after[0], re.ASCII) else None
    at = parts.index("weight") if "weight" in parts else 0
    return block, parts[at - 1] if at > 0 and parts[at - 1] else weight


def _row(imatrix: Imatrix, name: str, used: set[str]) -> TensorStatistics:
    counts = imatrix.counts[name]
    seen = counts > 0
    means = (imatrix.sums[name][seen] / counts[seen, None]).astype(np.float32).reshape(-1)
    n, total = means.size, _sum(means)
    mean = total / np.float32(n)
    stddev = np.sqrt(np.maximum(_sum(means * means) / np.float32(n) - mean * mean, np.float32(0)))
    entropy = _entropy(means, total)
    block, tensor = block_and_kind(name)
    return TensorStatistics(
        weight=name,
        block=block,
        tensor=tensor,
        total=float(total),
        least=float(means.min()),
        greatest=float(means.max()),
        mean=float(mean),
        stddev=float(stddev),
        active=1 - float(np.count_nonzero(means <= _INACTIVE)) / n,
        n=n,
        entropy=entropy,
        entropy_share=entropy / float(np.log2(n)) if n > 1 else 0.0,
        zd=float(np.count_nonzero((means - mean) / stddev > 1)) / n if stddev > 0 else 0.0,
        cos_sim=_cos_sim(imatrix, name, used),
    )


def _sum(values: Column) -> np.float32:
    """As std::accumulate sums floats; numpy's own sum is pairwise."""
    last: np.float32 = np.cumsum(values, dtype=np.float32)[-1]
    return last


def _entropy(means: Column, total: np.float32) -> float:
    if total <= 0:
        return 0.0
    shares = means / total
    shares = shares[shares > 0]
    return float(-_sum(shares * np.log2(shares)))


def _cos_sim(imatrix: Imatrix, name: str, used: set[str]) -> float:
    match = re.search(r"blk\.(\d{1,9})\.", name, re.ASCII)
    if match is None:
        return 0.0
    before = f"{name[: match.start(1)]}{int(match[1]) - 1}{name[match.end(1) :]}"
    # The tool reads past the end where the sizes differ.
    if before not in used or imatrix.sums[before].size != imatrix.sums[name].size:
        return 0.0
    a, b = imatrix.sums[name].reshape(-1), imatrix.sums[before].reshape(-1)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms > 0 else 0.0
