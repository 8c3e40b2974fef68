"""Where the codebook types keep scales, grid indices and signs in a block's bits, and the grids themselves.

Takes the bytes of blocks, gives their fields, and the bytes with new codes; chooses no code and computes no error.
Layouts follow ggml/src/ggml-common.h and dequantize_row_iq* in ggml/src/ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from gguf import quants

Bits = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int16]
Floats = npt.NDArray[np.float32]

BLOCK = 256


def _bits(n: int, width: int, first: Callable[[int], int]) -> Bits:
    """Of ``n`` fields the numbers of their ``width`` neighbouring bits [n, width], lowest first."""
    return np.array([first(i) for i in range(n)])[:, None] + np.arange(width)


@dataclass(frozen=True)
class Fields:
    """What the blocks of a slab hold, columns first: grid ``indices`` [n_vectors, n_rows], ``patterns`` of each group
    of columns [n_groups, n_rows] (bit j: column j is negative; of IQ1 types bit 0: the shift is negative), ``scales``
    [n_scales, n_rows]."""

    indices: Ints
    patterns: Ints
    scales: Floats


@dataclass(frozen=True)
class Layout:
    """A codebook type. Fields are given by the numbers of their bits in the block [n_fields, n_bits].

    ``width``: columns that are chosen together; ``scale_terms`` a, b, c: a scale is d·(a + b·bits)·c, in this order;
    ``even``: an even number of columns is negative, the last sign is not stored; ``shift``: of the types without signs,
    what is added to the grid's values or taken from them; ``shift_is_shared``: by 32 columns.
    """

    grid_name: str
    width: int
    type_size: int
    index: Bits
    pattern: Bits
    scale: Bits
    scale_terms: tuple[float, float, float]
    super_scale: Bits
    even: bool = False
    shift: float = 0.0
    shift_is_shared: bool = False

    @cached_property
    def grid(self) -> Floats:
        """The grid's vectors [n_vectors, columns of a vector]."""
        source = getattr(quants, self.grid_name)
        source.init_grid()
        return np.ascontiguousarray(source.grid.reshape(source.grid_shape), dtype=np.float32)

    def unpack(self, data: Bytes) -> Fields:
        """The fields of ``data`` [n_rows, bytes per row]."""
        bits = self._split(data)
        indices, patterns, raw = (_gather(bits, table) for table in (self.index, self.pattern, self.scale))
        if self.even:
            patterns |= np.bitwise_count(patterns).astype(np.int16) % 2 << self.pattern.shape[1]
        d = _gather(bits, self.super_scale).view(np.float16).astype(np.float32)
        first, step, last = (np.float32(term) for term in self.scale_terms)
        scales = np.repeat(d, len(self.scale), axis=0) * (first + step * raw.astype(np.float32)) * last
        return Fields(indices, patterns, scales)

    def pack(self, data: Bytes, indices: Ints, patterns: Ints) -> Bytes:
        """``data`` with other ``indices`` and ``patterns``, as in :class:`Fields`; scales stay."""
        bits = self._split(data)
        _scatter(bits, self.index, indices)
        _scatter(bits, self.pattern, patterns)
        packed = np.packbits(bits.reshape(-1, len(data)), axis=0, bitorder="little")
        return np.ascontiguousarray(packed.T)

    def _split(self, data: Bytes) -> Bytes:
        """One byte per bit [n_blocks, bits of a block, n_rows]."""
        bits = np.unpackbits(np.ascontiguousarray(data.T), axis=0, bitorder="little")
        return bits.reshape(-1, 8 * self.type_size, len(data))


def _gather(bits: Bytes, table: Bits) -> Ints:
    """The fields of every block [n_blocks · n_fields, n_rows]."""
    found = np.zeros((len(bits), len(table), bits.shape[2]), dtype=np.int16)
    for place in range(table.shape[1]):
        found |= bits[:, table[:, place]].astype(np.int16) << place
    return found.reshape(-1, bits.shape[2])


def _scatter(bits: Bytes, table: Bits, values: Ints) -> None:
    values = values.reshape(len(bits), len(table), -1)
    for place in range(table.shape[1]):
        bits[:, table[:, place]] = values >> place & 1


_HALF = _bits(1, 16, lambda _: 0)
_SIXTEENTHS = (0.5, 1.0, 0.25)
_ODD = (1.0, 2.0, 1.0)

LAYOUTS = {
    "IQ2_XXS": Layout(
        grid_name="IQ2_XXS",
        width=8,
        type_size=66,
        index=_bits(32, 8, lambda v: 8 * (2 + v // 4 * 8 + v % 4)),
        pattern=_bits(32, 7, lambda g: 8 * (6 + g // 4 * 8) + 7 * (g % 4)),
        scale=_bits(8, 4, lambda s: 8 * (6 + s * 8) + 28),
        scale_terms=_SIXTEENTHS,
        super_scale=_HALF,
        even=True,
    ),
    "IQ2_XS": Layout(
        grid_name="IQ2_XS",
        width=8,
        type_size=74,
        index=_bits(32, 9, lambda v: 8 * (2 + 2 * v)),
        pattern=_bits(32, 7, lambda g: 8 * (2 + 2 * g) + 9),
        scale=_bits(16, 4, lambda s: 8 * 66 + 4 * s),
        scale_terms=_SIXTEENTHS,
        super_scale=_HALF,
        even=True,
    ),
    "IQ2_S": Layout(
        grid_name="IQ2_S",
        width=8,
        type_size=82,
        index=np.hstack([_bits(32, 8, lambda v: 8 * (2 + v)), _bits(32, 2, lambda v: 8 * 66 + 2 * v)]),
        pattern=_bits(32, 8, lambda g: 8 * (34 + g)),
        scale=_bits(16, 4, lambda s: 8 * 74 + 4 * s),
        scale_terms=_SIXTEENTHS,
        super_scale=_HALF,
    ),
    "IQ3_XXS": Layout(
        grid_name="IQ3_XXS",
        width=8,
        type_size=98,
        index=_bits(64, 8, lambda v: 8 * (2 + v)),
        pattern=_bits(32, 7, lambda g: 8 * (66 + g // 4 * 4) + 7 * (g % 4)),
        scale=_bits(8, 4, lambda s: 8 * (66 + 4 * s) + 28),
        scale_terms=(0.5, 1.0, 0.5),
        super_scale=_HALF,
        even=True,
    ),
    "IQ3_S": Layout(
        grid_name="IQ3_S",
        width=4,
        type_size=110,
        index=np.hstack([_bits(64, 8, lambda v: 8 * (2 + v)), _bits(64, 1, lambda v: 8 * 66 + v)]),
        pattern=_bits(64, 4, lambda g: 8 * 74 + 4 * g),
        scale=_bits(8, 4, lambda s: 8 * 106 + 4 * s),
        scale_terms=_ODD,
        super_scale=_HALF,
    ),
    "IQ1_S": Layout(
        grid_name="IQ1_S",
        width=8,
        type_size=50,
        index=np.hstack(
            [_bits(32, 8, lambda v: 8 * (2 + v)), _bits(32, 3, lambda v: 8 * (34 + v // 4 * 2) + 3 * (v % 4))]
        ),
        pattern=_bits(32, 1, lambda g: 8 * (34 + g // 4 * 2) + 15),
        scale=_bits(8, 3, lambda s: 8 * (34 + 2 * s) + 12),
        scale_terms=_ODD,
        super_scale=_HALF,
        shift=0.125,
        shift_is_shared=True,
    ),
    "IQ1_M": Layout(
        grid_name="IQ1_M",
        width=8,
        type_size=56,
        index=np.hstack([_bits(32, 8, lambda v: 8 * v), _bits(32, 3, lambda v: 8 * 32 + 4 * v)]),
        pattern=_bits(32, 1, lambda g: 8 * 32 + 4 * g + 3),
        scale=_bits(16, 3, lambda s: 8 * (48 + s // 4 * 2) + 3 * (s % 4)),
        scale_terms=_ODD,
        # Four bits each in the highest ones of four words.
        super_scale=_bits(4, 4, lambda word: 8 * (48 + 2 * word) + 12).reshape(1, 16),
        shift=0.125,
    ),
}
