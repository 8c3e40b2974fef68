"""The factor that feedback goes by, against what it stands for in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dynrun.rounding.factor import Factor, factor
from dynrun.rounding.feedback import blocks

Matrix = npt.NDArray[np.float64]
DAMPING = 1e-3


def covariance(n: int, n_rows: int = 500, *, noise: float = 0.3) -> npt.NDArray[np.float32]:
    """Σxxᵀ of inputs with three directions in common, and some columns larger than others."""
    random = np.random.default_rng(n)
    x = random.standard_normal((n_rows, 3)) @ random.standard_normal((3, n))
    x = (x + noise * random.standard_normal((n_rows, n))) * np.exp(random.standard_normal(n))
    return (x.T @ x).astype(np.float32)


def wanted(h: npt.NDArray[np.float32], damping: float = DAMPING, shrink: float = 0.0) -> Matrix:
    """What is decomposed, in the order of the columns."""
    exact = h.astype(np.float64)
    diagonal = np.diag(np.diag(exact))
    return exact + shrink * (diagonal - exact) + damping * (np.diag(exact).mean() or 1.0) * np.eye(len(h))


def product(found: Factor) -> Matrix:
    r = found.r.double().numpy()
    return np.asarray(r @ r.T)


def difference(one: Matrix, other: Matrix) -> float:
    """The largest, in units of what the two columns' inputs can have in common at most."""
    size = np.sqrt(np.diag(other))
    return float(np.abs((one - other) / np.outer(size, size)).max())


@pytest.mark.parametrize("shrink", [0.0, 0.4, 1.0])
def test_its_square_is_the_damped_and_shrunk_matrix_in_the_given_order(shrink: float) -> None:
    h, order = covariance(48), np.random.default_rng(1).permutation(48)
    before = h.copy()
    found = factor(h, 0.01, order, shrink=shrink)
    assert found.r.dtype == torch.float32
    assert torch.equal(found.r, found.r.triu())
    assert difference(product(found), wanted(h, 0.01, shrink)[np.ix_(order, order)]) < 1e-5
    assert np.array_equal(found.order, order)
    assert np.array_equal(h, before)


def test_nothing_flows_from_or_to_columns_whose_input_is_always_zero() -> None:
    h, dead = covariance(40), [0, 7, 8, 39]
    h[dead], h[:, dead] = 0, 0
    found = factor(h, DAMPING, np.arange(40))
    assert difference(product(found), wanted(h)) < 1e-5
    flow = found.between(slice(0, 8), slice(8, 40)).numpy()
    assert not flow[[0, 7]].any()
    assert not flow[:, [0, 31]].any()
    assert np.count_nonzero(flow) == 6 * 30


def test_a_massive_column_leaves_all_others_exact() -> None:
    h, massive = covariance(64), 21
    size = np.ones(64)
    size[massive] = np.sqrt(1e6 * np.diag(h).mean() / h[massive, massive])
    h = (h * np.outer(size, size)).astype(np.float32)
    # Damped by the others' mean: that of all would be far above them.
    damping = 1e-3 / 1e6
    assert difference(product(factor(h, DAMPING, np.arange(64))), wanted(h)) < 1e-5
    found, exact = factor(h, damping, np.arange(64)), wanted(h, damping)
    assert difference(product(found), exact) < 1e-5
    done, rest = slice(0, 32), slice(32, 64)
    best = exact[done, rest] @ np.linalg.inv(exact[rest, rest])
    scale = np.sqrt(np.diag(exact))
    flow = found.between(done, rest).double().numpy()
    assert np.allclose(flow * scale[rest] / scale[done, None], best * scale[rest] / scale[done, None], atol=1e-3)


@pytest.mark.parametrize(
    ("rank", "damping"), [(0, 1e-2), (1, 1e-2), (1, 1e-4), (1, 0.0), (5, 1e-2), (5, 1e-4), (5, 0.0)]
)
def test_a_singular_matrix_has_a_factor(rank: int, damping: float) -> None:
    x = np.random.default_rng(rank).standard_normal((rank, 96))
    h = (x.T @ x).astype(np.float32)
    found = factor(h, damping, np.arange(96))
    assert np.isfinite(product(found)).all()
    # Without damping something else has to be added.
    assert difference(product(found), wanted(h, damping)) < (1e-5 if damping else 1e-3)


def test_errors_of_the_columns_done_move_the_next_ones_to_where_the_output_error_can_be_least() -> None:
    h, n_done = covariance(32), 12
    found, exact = factor(h, DAMPING, np.arange(32)), wanted(h)
    errors = np.random.default_rng(2).standard_normal((5, n_done))
    # The least eHeᵀ over the errors still open, those of the done ones given.
    least = -errors @ exact[:n_done, n_done:] @ np.linalg.inv(exact[n_done:, n_done:])
    moved = errors @ found.between(slice(0, n_done), slice(n_done, 20)).double().numpy()
    assert np.allclose(-moved, least[:, :8], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("group", [1, 4, 8])
def test_in_groups_of_columns_it_is_a_unit_triangle_and_a_metric_of_each_group(group: int) -> None:
    found = factor(covariance(24), DAMPING, np.arange(24))
    unit, metrics = (part.double().numpy() for part in blocks(found.r, group))
    whole = np.zeros((24, 24))
    for i, metric in enumerate(metrics):
        here = slice(i * group, (i + 1) * group)
        whole[here, here] = metric
        assert np.allclose(unit[here, here], np.eye(group), atol=1e-4)
        assert not unit[here.stop :, here].any()
    assert difference(unit @ whole @ unit.T, product(found)) < 1e-4
