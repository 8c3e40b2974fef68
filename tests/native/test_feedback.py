"""Rounding with feedback: what it gains on inputs that it has not seen, and against GPTQ as its paper has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.llamacpp.library import ggml
from dynrun.rounding.factor import factor
from dynrun.rounding.feedback import Rounder

pytestmark = pytest.mark.native
Rows = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Order = npt.NDArray[np.int64]
DAMPING = 1e-3
# Types, and how much of plain rounding's error may be left where codes are chosen again, and where they stay as ggml
# chose them and only later slabs make up for a slab.
LEFT = {
    "Q2_K": (0.2, 0.8),
    "Q3_K": (0.2, 0.8),
    "Q4_K": (0.2, 0.8),
    "Q6_K": (0.2, 0.8),
    "Q4_0": (0.2, 0.3),
    "Q8_0": (0.2, 0.3),
    "IQ4_NL": (0.2, 0.4),
    "IQ4_XS": (0.2, 0.8),
    "IQ3_XXS": (0.2, 0.8),
    "IQ2_XS": (0.2, 0.8),
}
every_type = pytest.mark.parametrize("type_name", LEFT)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for other threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@dataclass(frozen=True)
class Layer:
    """Weights, Σxxᵀ of some inputs, and inputs that are not in it."""

    rows: Rows
    h: Rows
    held_out: Rows

    @property
    def importance(self) -> Rows:
        return np.ascontiguousarray(np.diag(self.h) / 2000)

    def plain(self, type_name: str) -> Rows:
        return dequantized(type_name, quantized(type_name, self.rows, self.importance), self.rows.shape[1])

    def rounded(
        self, type_name: str, *, within: bool = True, order: Order | None = None, n_threads: int = 1, sweeps: int = 0
    ) -> tuple[Bytes, Rows]:
        found = factor(self.h, DAMPING, np.arange(len(self.h)) if order is None else order)
        return Rounder(n_threads).round(self.rows, found, type_name, self.importance, within=within, sweeps=sweeps)

    def fitted(self, values: Rows) -> float:
        """Σ eᵀHe on the inputs that H is of, damped as it is for feedback."""
        h = self.h.astype(np.float64)
        h[np.diag_indices(len(h))] += DAMPING * np.diag(h).mean()
        error = (self.rows - values).astype(np.float64)
        return float(np.einsum("ri,ij,rj->", error, h, error))

    def error(self, values: Rows) -> float:
        return float(np.square(self.held_out @ (self.rows - values).T, dtype=np.float64).sum())


def quantized(type_name: str, rows: Rows, importance: Rows | None) -> Bytes:
    kind = TENSOR_TYPES[type_name]
    ggml().ggml_quantize_init(kind.ggml_id)
    return ggml().quantize(kind.ggml_id, rows, importance).reshape(len(rows), -1)


def dequantized(type_name: str, data: Bytes, n: int) -> Rows:
    return ggml().dequantize(TENSOR_TYPES[type_name].ggml_id, np.ascontiguousarray(data), len(data), n)


@cache
def layer(n: int, n_rows: int = 16) -> Layer:
    """Inputs with three dominant directions, weights with outliers."""
    random = np.random.default_rng(n)
    directions = random.standard_normal((3, n))
    x = random.standard_normal((2200, 3)) @ directions + 0.3 * random.standard_normal((2200, n))
    x = x.astype(np.float32)
    rows = (0.02 * random.standard_t(5, (n_rows, n))).astype(np.float32)
    return Layer(rows, x[:2000].T @ x[:2000], x[2000:])


def with_inputs(base: Layer, scale: npt.NDArray[np.float64]) -> Layer:
    """The same layer where each column's input is so many times larger."""
    h = base.h * np.outer(scale, scale)
    return Layer(base.rows, h.astype(np.float32), (base.held_out * scale).astype(np.float32))


def width_of(type_name: str, n_slabs: int) -> int:
    """Columns of as many slabs of 256, of types of smaller blocks that times as many blocks of 32 by four."""
    return n_slabs * max(128, TENSOR_TYPES[type_name].block_size)


@every_type
def test_it_lowers_the_output_error_on_inputs_that_it_has_not_seen(type_name: str) -> None:
    it = layer(width_of(type_name, 3))
    plain = it.error(it.plain(type_name))
    for within, left in zip((True, False), LEFT[type_name], strict=True):
        data, values = it.rounded(type_name, within=within)
        assert data.dtype == np.uint8
        assert np.array_equal(values, dequantized(type_name, data, it.rows.shape[1]))
        assert 0 < it.error(values) < left * plain


@every_type
def test_rows_of_zeros_dead_and_massive_columns_are_rounded_the_same_in_every_run(type_name: str) -> None:
    n = width_of(type_name, 1)
    base, scale = layer(n), np.ones(n)
    # Single columns, and a block of them; a square a million times the others'.
    scale[::5], scale[30:70], scale[21] = 0, 0, 1e3
    rows = base.rows.copy()
    rows[::4] = 0
    it = with_inputs(Layer(rows, base.h, base.held_out), scale)
    data, values = it.rounded(type_name)
    assert np.isfinite(values).all()
    assert not values[::4].any()
    assert np.array_equal(values, dequantized(type_name, data, n))
    assert it.error(values) < 0.5 * it.error(it.plain(type_name))
    assert np.array_equal(it.rounded(type_name)[0], data)


@every_type
def test_where_inputs_have_nothing_in_common_it_is_no_worse_than_plain_rounding(type_name: str) -> None:
    n = width_of(type_name, 1)
    h = np.diag(np.exp(np.random.default_rng(3).standard_normal(n))).astype(np.float32)
    it = Layer(layer(n).rows, 2000 * h, layer(n).held_out)
    _, values = it.rounded(type_name)
    # Some of ggml's searches for a scale look at all of a row: here they see a slab.
    slack = 1.01 if TENSOR_TYPES[type_name].block_size < 256 else 1 + 1e-5
    weighted = [np.square(it.rows - q) @ np.diag(h) for q in (values, it.plain(type_name))]
    assert weighted[0].sum() <= slack * weighted[1].sum()
    if TENSOR_TYPES[type_name].block_size == 256:
        assert (weighted[0] <= weighted[1] * (1 + 1e-2)).all()


@pytest.mark.parametrize("type_name", ["Q4_K", "IQ2_XS"])
def test_codes_that_stay_are_those_that_ggml_gives_each_slab(type_name: str) -> None:
    n = width_of(type_name, 2)
    it = Layer(layer(n).rows, np.diag(np.diag(layer(n).h)), layer(n).held_out)
    data, _ = it.rounded(type_name, within=False)
    assert np.array_equal(data, quantized(type_name, it.rows, it.importance))


@pytest.mark.parametrize("type_name", ["Q3_K", "IQ4_NL"])
def test_slabs_may_come_in_any_order(type_name: str) -> None:
    block = TENSOR_TYPES[type_name].block_size
    it = layer(width_of(type_name, 2))
    n = it.rows.shape[1]
    order = np.arange(n).reshape(-1, block)[::-1].flatten()
    data, values = it.rounded(type_name, order=order)
    assert np.array_equal(values, dequantized(type_name, data, n))
    assert it.error(values) < LEFT[type_name][0] * it.error(it.plain(type_name))


@every_type
def test_every_sweep_lowers_the_error_that_feedback_left(type_name: str) -> None:
    it = layer(width_of(type_name, 2))
    order = np.arange(it.rows.shape[1]).reshape(-1, TENSOR_TYPES[type_name].block_size)[::-1].flatten()
    found = [it.rounded(type_name, sweeps=sweeps, order=order) for sweeps in (0, 1, 2)]
    errors = [it.fitted(values) for _, values in found]
    assert errors[1] < errors[0]
    assert errors[2] <= errors[1] * (1 + 1e-5)
    data, values = found[1]
    assert np.array_equal(values, dequantized(type_name, data, it.rows.shape[1]))


def test_a_type_whose_codes_cannot_be_chosen_again_has_feedback_between_slabs() -> None:
    it = layer(512)
    data, values = it.rounded("TQ2_0")
    assert np.array_equal(data, it.rounded("TQ2_0", within=False)[0])
    assert it.error(values) < 0.9 * it.error(it.plain("TQ2_0"))


@pytest.mark.parametrize("n_rows", [150, 1600])
@pytest.mark.parametrize("type_name", ["Q4_0", "IQ4_XS", "IQ3_XXS"])
def test_the_bytes_do_not_depend_on_the_number_of_threads(type_name: str, n_rows: int) -> None:
    it = layer(256, n_rows)
    one = it.rounded(type_name, n_threads=1)[0]
    assert np.array_equal(it.rounded(type_name, n_threads=3)[0], one)


@pytest.mark.parametrize("type_name", ["Q4_K", "IQ4_NL", "IQ3_XXS", "IQ2_XS"])
def test_a_single_row_and_no_imatrix_will_do(type_name: str) -> None:
    n = width_of(type_name, 1)
    it = layer(n, 1)
    importance = np.ones(n, dtype=np.float32) if TENSOR_TYPES[type_name].needs_imatrix else None
    data, values = Rounder(1).round(it.rows, factor(it.h, DAMPING, np.arange(n)), type_name, importance)
    assert np.array_equal(values, dequantized(type_name, data, n))
    assert np.square(it.rows - values).sum() < 0.5 * np.square(it.rows).sum()


def gptq(it: Layer) -> Bytes:
    """Codes in Q4_0 by algorithm 1 of arXiv 2210.17323 in float64, each slab's scales as ggml sets them."""
    h = it.h.astype(np.float64)
    n = len(h)
    upper = np.linalg.cholesky(np.linalg.inv(h + DAMPING * np.diag(h).mean() * np.eye(n))).T
    weights, codes = it.rows.astype(np.float64), np.empty(it.rows.shape, dtype=np.uint8)
    for j in range(n):
        if j % 32 == 0:
            slab = np.ascontiguousarray(weights[:, j : j + 32], dtype=np.float32)
            scale, _ = parts(quantized("Q4_0", slab, it.importance[j : j + 32]))
        codes[:, j] = np.clip(np.round(weights[:, j] / scale[:, 0]) + 8, 0, 15)
        error = (weights[:, j] - scale[:, 0] * (codes[:, j] - 8.0)) / upper[j, j]
        weights[:, j + 1 :] -= np.outer(error, upper[j, j + 1 :])
    return codes


def parts(data: Bytes) -> tuple[npt.NDArray[np.float64], Bytes]:
    """Scales [n_rows, n_blocks] and codes [n_rows, n] of Q4_0 (block_q4_0 of ggml-common.h)."""
    blocks = data.reshape(len(data), -1, 18)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float64)
    codes = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
    return scales, codes.reshape(len(data), -1)


def test_it_is_gptq() -> None:
    it = layer(192, 48)
    found, wanted = parts(it.rounded("Q4_0")[0])[1], gptq(it)
    assert (found == wanted).mean() >= 0.999
    # Plain rounding gives other ones.
    assert (parts(quantized("Q4_0", it.rows, it.importance))[1] == wanted).mean() < 0.95
