"""Choosing grid vectors and signs of ggml's codebook types again, judged by ggml's own dequantizer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.llamacpp.library import ggml
from dynrun.rounding.codebooks import Codebook, open_codebook

pytestmark = pytest.mark.native
TYPES = ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M"]
N_ROWS, N_COLUMNS = 24, 512
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def _rows() -> Floats:
    """Rows with outliers, whole and half rows of zeros, and zeros between other values."""
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((N_ROWS, N_COLUMNS)).astype(np.float32) * 0.02
    rows[rng.random(rows.shape) < 0.01] *= 12
    rows[rng.random(rows.shape) < 0.02] = 0
    rows[3, 7] = 40
    rows[5] = 0
    rows[6, : N_COLUMNS // 2] = 0
    return rows


@cache
def _data(type_name: str) -> Bytes:
    return _quantized(type_name, _rows())


def _quantized(type_name: str, rows: Floats) -> Bytes:
    kind = TENSOR_TYPES[type_name]
    imatrix = np.exp(np.random.default_rng(6).standard_normal(rows.shape[1])).astype(np.float32)
    ggml().ggml_quantize_init(kind.ggml_id)
    return ggml().quantize(kind.ggml_id, rows, imatrix).reshape(len(rows), -1)


def _values(type_name: str, data: Bytes) -> Floats:
    return ggml().dequantize(TENSOR_TYPES[type_name].ggml_id, data, len(data), N_COLUMNS)


def _open(type_name: str, data: Bytes) -> Codebook:
    codes = open_codebook(type_name, data, len(data), N_COLUMNS, "cpu")
    assert codes is not None
    return codes


def _metric(width: int, seed: int) -> torch.Tensor:
    """Correlated inputs: condition numbers of about 20 (4 columns) and 30 (8 columns)."""
    inputs = np.random.default_rng(seed).standard_normal((width, 3 * width))
    return torch.tensor(inputs @ inputs.T / width, dtype=torch.float32)


def _costs(x: torch.Tensor, values: torch.Tensor, metric: torch.Tensor) -> npt.NDArray[np.float64]:
    error = (x - values).double()
    costs: npt.NDArray[np.float64] = (error * (metric.double() @ error)).sum(0).numpy()
    return costs


def _groups(codes: Codebook, rows: Floats) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """The columns of each group, what is wanted there, and a metric."""
    for first in range(0, N_COLUMNS, codes.width):
        here = slice(first, first + codes.width)
        yield here, torch.from_numpy(np.ascontiguousarray(rows[:, here].T)), _metric(codes.width, first)


@pytest.mark.parametrize("type_name", TYPES)
def test_codes_that_nobody_chose_again_are_packed_into_the_bytes_they_came_from(type_name: str) -> None:
    data = _data(type_name)
    np.testing.assert_array_equal(_open(type_name, data).data(), data)


@pytest.mark.parametrize("type_name", TYPES)
def test_the_values_returned_are_bit_for_bit_what_ggml_reads_from_the_bytes(type_name: str) -> None:
    rows, data = _rows(), _data(type_name)
    codes = _open(type_name, data)
    # Other wishes than the original, as feedback has them.
    wishes = rows * np.float32(1.1) - np.float32(0.003)
    values = torch.cat([codes.choose(here.start, x, metric) for here, x, metric in _groups(codes, wishes)])
    found = codes.data()
    assert (found != data).any()
    np.testing.assert_array_equal(_values(type_name, found).view(np.uint32), values.T.numpy().view(np.uint32))


@pytest.mark.parametrize("type_name", TYPES)
def test_no_row_is_worse_in_the_metric_than_ggmls_codes_and_the_mean_is_better(type_name: str) -> None:
    rows, data = _rows(), _data(type_name)
    codes, before = _open(type_name, data), torch.from_numpy(_values(type_name, data))
    found = []
    for here, x, metric in _groups(codes, rows):
        values = codes.choose(here.start, x, metric)
        found.append([_costs(x, before[:, here].T, metric), _costs(x, values, metric)])
    old, new = np.array(found).transpose(1, 0, 2)
    # Costs are compared in float32.
    assert (new <= old * (1 + 1e-5)).all()
    # By row, as one row's outliers would drown the others.
    total = old.sum(0)
    assert (new.sum(0)[total > 0] / total[total > 0]).mean() < 0.9


@pytest.mark.parametrize("type_name", TYPES)
def test_blocks_without_a_scale_keep_their_bytes_whatever_is_wanted(type_name: str) -> None:
    rows, data = _rows(), _data(type_name)
    codes = _open(type_name, data)
    for here, x, metric in _groups(codes, np.full_like(rows, 0.5)):
        values = codes.choose(here.start, x, metric)
        assert not values[:, 5].any()
        assert values[:, 6].any() == (here.start >= N_COLUMNS // 2)
    half = data.shape[1] // 2
    np.testing.assert_array_equal(codes.data()[5], data[5])
    np.testing.assert_array_equal(codes.data()[6, :half], data[6, :half])


def _best_costs(type_name: str, x: torch.Tensor, scale: Floats, metric: torch.Tensor) -> npt.NDArray[np.float64]:
    """Of each row the least cost over every vector of the grid with every allowed pattern of signs."""
    from gguf import quants

    source = getattr(quants, type_name)
    source.init_grid()
    grid = source.grid.reshape(source.grid_shape).astype(np.float64)
    best = np.full(x.shape[1], np.inf)
    for signs in product((1.0, -1.0), repeat=grid.shape[1]):
        if type_name != "IQ2_XS" or np.prod(signs) > 0:
            error = x.numpy()[None].astype(np.float64) - scale * (grid * signs)[:, :, None]
            cost = np.einsum("gir,ij,gjr->gr", error, metric.numpy().astype(np.float64), error, optimize=True)
            best = np.minimum(best, cost.min(0))
    return best


# The smallest magnitude of the grid gives a row's first scale away: over the columns that it holds for, one has it.
@pytest.mark.parametrize(
    ("type_name", "smallest", "n_shared", "excess"), [("IQ3_S", 1, 32, 0.02), ("IQ2_XS", 8, 16, 0.04)]
)
def test_the_codes_found_are_near_the_best_of_all_there_are(
    type_name: str, smallest: int, n_shared: int, excess: float
) -> None:
    rows = np.random.default_rng(9).standard_normal((N_ROWS, N_COLUMNS)).astype(np.float32)
    data = _quantized(type_name, rows)
    codes, scale = _open(type_name, data), np.abs(_values(type_name, data)[:, :n_shared]).min(1) / smallest
    found, best = [], []
    for first in range(0, 16, codes.width):
        x, metric = torch.from_numpy(rows[:, first : first + codes.width].T.copy()), _metric(codes.width, first)
        best.append(_best_costs(type_name, x, scale, metric))
        found.append(_costs(x, codes.choose(first, x, metric), metric))
    assert np.mean(found) <= np.mean(best) * (1 + excess)
    assert (np.array(found) >= np.array(best) * (1 - 1e-4)).all()


def test_types_without_a_codebook_are_not_opened_and_data_of_another_size_is_refused() -> None:
    data = np.zeros((2, 98), dtype=np.uint8)
    assert open_codebook("Q4_K", data, 2, 256, "cpu") is None
    assert open_codebook("IQ3_XXS", data, 2, 256, "cpu") is not None
    with pytest.raises(ValueError, match="196 bytes for 2 × 512 values in IQ3_XXS"):
        open_codebook("IQ3_XXS", data, 2, 512, "cpu")
