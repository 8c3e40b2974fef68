"""Codes of the scalar types chosen again in slabs that ggml quantized, against ggml's own dequantizer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.llamacpp.library import ggml
from dynrun.rounding.formats import open_codes
from dynrun.rounding.scalar import LAYOUTS

pytestmark = pytest.mark.native
Rows = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
N_ROWS, ZERO, HUGE, CONSTANT, TINY = 40, 0, 1, 2, 3
every_type = pytest.mark.parametrize("type_name", LAYOUTS)
every_slab = pytest.mark.parametrize(("n_blocks", "with_imatrix"), [(2, False), (2, True), (3, False), (3, True)])


def bits(values: Rows) -> npt.NDArray[np.uint32]:
    """Floats compared by their bits tell −0 from 0."""
    return np.ascontiguousarray(values).view(np.uint32)


@dataclass(frozen=True)
class Slab:
    """Rows as they were, and as ggml quantized them."""

    type_name: str
    rows: Rows
    data: Bytes

    def dequantized(self, data: Bytes) -> Rows:
        return ggml().dequantize(TENSOR_TYPES[self.type_name].ggml_id, np.ascontiguousarray(data), *self.rows.shape)

    def chosen(self, wanted: Rows) -> tuple[Bytes, Rows]:
        """Bytes and values once the codes of all columns are chosen for ``wanted``."""
        n_rows, n = self.rows.shape
        codes = open_codes(self.type_name, self.data, n_rows, n, "cpu")
        assert codes is not None
        assert codes.width == 1
        x = torch.from_numpy(np.ascontiguousarray(wanted.T))
        values = torch.cat([codes.choose(i, x[i : i + 1], torch.ones(1, 1)) for i in range(n)])
        return codes.data(), values.numpy().T


def slab_of(type_name: str, n_blocks: int, with_imatrix: bool) -> Slab:
    """Weights with outliers, and a few rows of extremes."""
    kind, random = TENSOR_TYPES[type_name], np.random.default_rng(n_blocks)
    n = n_blocks * kind.block_size
    rows = (0.02 * random.standard_t(3, (N_ROWS, n))).astype(np.float32)
    rows[ZERO], rows[HUGE, n // 2], rows[CONSTANT] = 0.0, 1e4, 0.3
    rows[TINY] *= 1e-6
    importance = np.exp(2 * random.standard_normal(n)).astype(np.float32) if with_imatrix else None
    data = ggml().quantize(kind.ggml_id, rows, importance)
    return Slab(type_name, rows, data.reshape(N_ROWS, -1))


@every_slab
@every_type
def test_ggmls_own_values_choose_ggmls_codes(type_name: str, n_blocks: int, with_imatrix: bool) -> None:
    slab = slab_of(type_name, n_blocks, with_imatrix)
    wanted = slab.dequantized(slab.data)
    data, values = slab.chosen(wanted)
    np.testing.assert_array_equal(bits(values), bits(wanted))
    np.testing.assert_array_equal(data, slab.data)


@every_slab
@every_type
def test_values_are_what_ggml_reads_from_the_bytes(type_name: str, n_blocks: int, with_imatrix: bool) -> None:
    slab = slab_of(type_name, n_blocks, with_imatrix)
    wanted = slab.rows + np.float32(0.01) * np.roll(slab.rows, 1, axis=0)
    data, values = slab.chosen(wanted)
    np.testing.assert_array_equal(bits(values), bits(slab.dequantized(data)))
    assert np.any(data != slab.data)


@every_slab
@every_type
def test_no_weight_gets_further_from_its_target(type_name: str, n_blocks: int, with_imatrix: bool) -> None:
    slab = slab_of(type_name, n_blocks, with_imatrix)
    _, values = slab.chosen(slab.rows)
    before = np.abs(slab.rows - slab.dequantized(slab.data))
    # Between two levels equally far away rounding errors decide.
    assert np.all(np.abs(slab.rows - values) <= before * (1 + 1e-4))


@every_type
def test_no_level_of_the_grid_is_nearer_than_the_chosen_one(type_name: str) -> None:
    slab, layout = slab_of(type_name, 2, True), LAYOUTS[type_name]
    wanted = np.roll(slab.rows, 1, axis=1) * np.float32(2)
    _, values = slab.chosen(wanted)
    kind, nearest = TENSOR_TYPES[type_name], np.full(wanted.shape, np.inf, dtype=np.float32)
    for code in range(layout.lowest, len(layout.levels)):
        blocks = slab.data.reshape(-1, kind.type_size).copy()
        for plane in layout.codes:
            plane.write(blocks, np.full((len(blocks), kind.block_size), code, dtype=np.uint8))
        nearest = np.minimum(nearest, np.abs(wanted - slab.dequantized(blocks)))
    # Values far from 0 that lie near a level are as far from it as their last bit is worth.
    assert np.all(np.abs(wanted - values) <= nearest * (1 + 1e-4) + 1e-6 * np.abs(wanted))


@every_type
def test_untouched_codes_give_ggmls_bytes_back(type_name: str) -> None:
    slab = slab_of(type_name, 3, True)
    codes = open_codes(type_name, slab.data, *slab.rows.shape, "cpu")
    assert codes is not None
    np.testing.assert_array_equal(codes.data(), slab.data)


@every_type
def test_a_row_of_zeros_stays_one(type_name: str) -> None:
    slab = slab_of(type_name, 2, False)
    data, values = slab.chosen(slab.rows)
    assert not values[ZERO].any()
    np.testing.assert_array_equal(data[ZERO], slab.data[ZERO])


@every_type
def test_data_of_another_size_is_refused(type_name: str) -> None:
    slab = slab_of(type_name, 2, False)
    with pytest.raises(ValueError, match="reshape"):
        open_codes(type_name, slab.data[:-1], *slab.rows.shape, "cpu")
