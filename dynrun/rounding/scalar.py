"""Codes of the types that store every weight by itself: a level of its sub-block's grid, uniform or a table of 16.

Takes the bytes that ggml wrote, keeps their scales and minima, and takes for every wanted value the nearest level. One
table says where a block of each type has its codes and scales (ggml/src/ggml-common.h) and how they make a value
(dequantize_row_* in ggml/src/ggml-quants.c, operations in the same order). Decides nothing about feedback.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from gguf.quants import IQ4_NL, MXFP4, NVFP4

from dynrun.gguf.tensor_types import TENSOR_TYPES

if TYPE_CHECKING:
    import torch

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Plane:
    """Bit field of ``n`` values in a block's bytes from ``start`` on.

    Every ``chunk`` bytes hold the field of as many values in their lowest ``bits``, of the next ones above, and so on.
    ``shift``: the field's place in the value. ``flip``: 0x80 turns int8 into an unsigned code 128 higher.
    """

    start: int
    n: int
    bits: int
    chunk: int
    shift: int = 0
    flip: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.n * self.bits // 8

    @property
    def shifts(self) -> Bytes:
        """Of the values that share a byte: [8 / bits, 1]."""
        return np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]

    def read(self, blocks: Bytes) -> Bytes:
        """The field of every value [n_blocks, n], at its place in the value."""
        stored = blocks[:, self.start : self.stop] ^ np.uint8(self.flip)
        fields = stored.reshape(len(blocks), -1, 1, self.chunk) >> self.shifts & np.uint8(2**self.bits - 1)
        return fields.reshape(len(blocks), self.n) << np.uint8(self.shift)

    def write(self, blocks: Bytes, values: Bytes) -> None:
        """Overwrite the field by that of ``values`` [n_blocks, n]."""
        fields = values >> np.uint8(self.shift) & np.uint8(2**self.bits - 1)
        parts = fields.reshape(len(blocks), -1, 8 // self.bits, self.chunk) << self.shifts
        stored = np.bitwise_or.reduce(parts, axis=2).reshape(len(blocks), -1)
        blocks[:, self.start : self.stop] = stored ^ np.uint8(self.flip)


def _read(blocks: Bytes, planes: tuple[Plane, ...]) -> Bytes:
    values = planes[0].read(blocks)
    for plane in planes[1:]:
        values |= plane.read(blocks)
    return values


# Scales and offsets [n_blocks, n sub-blocks] of blocks [n_blocks, type_size]; no offsets where all are 0, as adding
# them would make 0 of −0.
Scales = Callable[[Bytes], tuple[Floats, Floats | None]]


def _half(blocks: Bytes, start: int) -> Floats:
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _one_scale(blocks: Bytes) -> tuple[Floats, None]:
    return _half(blocks, 0), None


def _scale_and_offset(blocks: Bytes) -> tuple[Floats, Floats]:
    return _half(blocks, 0), _half(blocks, 2)


def _scaled(d_at: int, bias: int, *planes: Plane) -> Scales:
    """Scales that are d·(integer − bias)."""

    def scales(blocks: Bytes) -> tuple[Floats, None]:
        return _half(blocks, d_at) * (_read(blocks, planes).astype(np.float32) - np.float32(bias)), None

    return scales


def _q2_k(blocks: Bytes) -> tuple[Floats, Floats]:
    found = Plane(0, 32, 4, 16).read(blocks).astype(np.float32)
    return _half(blocks, 80) * found[:, :16], -(_half(blocks, 82) * found[:, 16:])


def _q4_k(blocks: Bytes) -> tuple[Floats, Floats]:
    """Q4_K and Q5_K: 8 scales and 8 minima of 6 bits in 12 bytes (get_scale_min_k4)."""
    low, middle, mixed = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    integers = np.concatenate([low & 63, mixed & 15 | low >> 6 << 4], axis=1).astype(np.float32)
    minima = np.concatenate([middle & 63, mixed >> 4 | middle >> 6 << 4], axis=1).astype(np.float32)
    return _half(blocks, 0) * integers, -(_half(blocks, 2) * minima)


def _mxfp4(blocks: Bytes) -> tuple[Floats, None]:
    return MXFP4.e8m0_to_fp32_half(blocks[:, :1]), None


def _nvfp4(blocks: Bytes) -> tuple[Floats, None]:
    return NVFP4.ue4m3_to_fp32(blocks[:, :4]).astype(np.float32), None


@dataclass(frozen=True)
class Layout:
    """``levels`` are what the codes 0, 1, … stand for: value = scale·level + offset. Evenly spaced ones are a range,
    of which codes below ``lowest`` are not chosen."""

    scales: Scales
    codes: tuple[Plane, ...]
    levels: range | tuple[int, ...]
    lowest: int = 0


LAYOUTS: dict[str, Layout] = {
    "Q4_0": Layout(_one_scale, (Plane(2, 32, 4, 16),), range(-8, 8)),
    "Q4_1": Layout(_scale_and_offset, (Plane(4, 32, 4, 16),), range(16)),
    "Q5_0": Layout(_one_scale, (Plane(6, 32, 4, 16), Plane(2, 32, 1, 1, 4)), range(-16, 16)),
    "Q5_1": Layout(_scale_and_offset, (Plane(8, 32, 4, 16), Plane(4, 32, 1, 1, 4)), range(32)),
    # ggml writes no −128, and not every kernel need expect it.
    "Q8_0": Layout(_one_scale, (Plane(2, 32, 8, 32, flip=0x80),), range(-128, 128), lowest=1),
    "Q2_K": Layout(_q2_k, (Plane(16, 256, 2, 32),), range(4)),
    "Q3_K": Layout(
        _scaled(108, 32, Plane(96, 16, 4, 8), Plane(104, 16, 2, 4, 4)),
        (Plane(32, 256, 2, 32), Plane(0, 256, 1, 32, 2)),
        range(-4, 4),
    ),
    "Q4_K": Layout(_q4_k, (Plane(16, 256, 4, 32),), range(16)),
    "Q5_K": Layout(_q4_k, (Plane(48, 256, 4, 32), Plane(16, 256, 1, 32, 4)), range(32)),
    "Q6_K": Layout(
        _scaled(208, 128, Plane(192, 16, 8, 16, flip=0x80)),
        (Plane(0, 256, 4, 64), Plane(128, 256, 2, 32, 4)),
        range(-32, 32),
    ),
    "IQ4_NL": Layout(_one_scale, (Plane(2, 32, 4, 16),), IQ4_NL.kvalues),
    "IQ4_XS": Layout(_scaled(0, 32, Plane(4, 8, 4, 1), Plane(2, 8, 2, 1, 4)), (Plane(8, 256, 4, 16),), IQ4_NL.kvalues),
    "MXFP4": Layout(_mxfp4, (Plane(1, 32, 4, 16),), MXFP4.kvalues),
    "NVFP4": Layout(_nvfp4, (Plane(4, 64, 4, 8),), NVFP4.kvalues),
}


class ScalarCodes:
    """Codes [n_columns, n_rows] of a slab, one column decided at a time; see formats.Codes."""

    width = 1

    def __init__(self, type_name: str, data: Bytes, n_rows: int, n_columns: int, device: str) -> None:
        import torch

        def columns(values: npt.NDArray[np.float32 | np.uint8]) -> torch.Tensor:
            """Values of consecutive blocks as [per row, n_rows]."""
            return torch.from_numpy(np.ascontiguousarray(values.reshape(n_rows, -1).T)).to(device)

        kind, self._layout = TENSOR_TYPES[type_name], LAYOUTS[type_name]
        self._blocks = data.reshape(n_rows * (n_columns // kind.block_size), kind.type_size)
        scales, offsets = self._layout.scales(self._blocks)
        self._per_scale = kind.block_size // scales.shape[1]
        self._scales, self._offsets = columns(scales), None if offsets is None else columns(offsets)
        self._codes = columns(_read(self._blocks, self._layout.codes))
        # Known beforehand, as asking a GPU once per column would make it wait.
        self._has_zeros: list[bool] = (self._scales == 0).any(dim=1).tolist()
        self._grid = None if isinstance(self._layout.levels, range) else _Grid(self._layout.levels, device)

    def choose(self, first: int, x: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
        """See formats.Codes; of one column any metric has the nearest level as its best one.

        Where a scale is 0 every level gives the same value, and ggml's code stays.
        """
        import torch

        sub_block = first // self._per_scale
        scale, offset = self._scales[sub_block], None if self._offsets is None else self._offsets[sub_block]
        wanted = (x[0] if offset is None else x[0] - offset) / scale
        codes = self._nearest(wanted)
        if self._has_zeros[sub_block]:
            codes = torch.where(scale == 0, self._codes[first], codes)
        self._codes[first] = codes
        values = self._levels(codes).mul_(scale)
        return (values if offset is None else values.add_(offset))[None]

    def data(self) -> Bytes:
        """See formats.Codes."""
        blocks = self._blocks.copy()
        codes = np.ascontiguousarray(self._codes.T.cpu().numpy()).reshape(len(blocks), -1)
        for plane in self._layout.codes:
            plane.write(blocks, codes)
        return blocks.reshape(self._codes.shape[1], -1)

    def _nearest(self, wanted: torch.Tensor) -> torch.Tensor:
        """The code of the level nearest to each of ``wanted``, which it overwrites."""
        import torch

        if self._grid is not None:
            return self._grid.nearest(wanted)
        levels = self._layout.levels
        return wanted.round_().sub_(levels[0]).clamp_(self._layout.lowest, len(levels) - 1).to(torch.uint8)

    def _levels(self, codes: torch.Tensor) -> torch.Tensor:
        import torch

        if self._grid is not None:
            return self._grid.levels.index_select(0, codes.int())
        return codes.to(torch.float32).add_(self._layout.levels[0])


class _Grid:
    """Unevenly spaced whole numbers by code, on a device, and the code of the one nearest to any value.

    Bounds between two levels are multiples of ½, so that a table by ⌈2·value⌉ is exact; looking them up
    (torch.bucketize) would spread every few hundred values over threads.
    """

    def __init__(self, levels: tuple[int, ...], device: str) -> None:
        import torch

        ordered, codes = np.unique(np.array(levels), return_index=True)
        twice = ordered[1:] + ordered[:-1]
        self.levels = torch.tensor(levels, dtype=torch.float32, device=device)
        self._first, self._last = int(twice[0]), int(twice[-1]) + 1
        table = codes[np.searchsorted(twice, np.arange(self._first, self._last + 1))]
        self._codes = torch.from_numpy(table.astype(np.uint8)).to(device)

    def nearest(self, wanted: torch.Tensor) -> torch.Tensor:
        """Overwrites ``wanted``; of two levels equally near the lower one."""
        at = wanted.mul_(2).ceil_().clamp_(self._first, self._last).sub_(self._first).int()
        # What is no number (of a scale that is 0 or infinite) has some code too.
        return self._codes.index_select(0, at.clamp_(min=0))


def open_scalar(type_name: str, data: Bytes, n_rows: int, n_columns: int, device: str) -> ScalarCodes | None:
    """See formats.open_codes; None for any type that is not stored value by value."""
    return ScalarCodes(type_name, data, n_rows, n_columns, device) if type_name in LAYOUTS else None
