"""Experts with few tokens: counted, and shrunk toward their layer's mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dynrun.calibration.experts import coverage, shrink_experts
from dynrun.calibration.imatrix import Imatrix, read_imatrix, unshrunk, write_imatrix

UP, DOWN = "blk.0.ffn_up_exps.weight", "blk.0.ffn_down_exps.weight"
TOKENS = [100.0, 10.0, 0.0, 50.0]


def moe(tokens: list[float] | None = None) -> Imatrix:
    random, counts = np.random.default_rng(0), np.array(TOKENS if tokens is None else tokens)
    sums = {name: random.random((len(counts), 6)) * counts[:, None] for name in (UP, DOWN)}
    dense, three = "blk.0.attn_q.weight", "blk.0.attn_k_b.weight"
    return Imatrix(
        sums | {dense: np.full((1, 6), 3.0), three: np.ones((2, 6))},
        {UP: counts, DOWN: counts, dense: np.array([3.0]), three: np.array([3.0, 3.0])},
    )


def mean(imatrix: Imatrix, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    found = imatrix.mean(name)
    assert found is not None
    return found


def test_coverage_counts_the_experts_of_a_block_once() -> None:
    (group,) = coverage(moe(), min_tokens=50)
    assert group.weights == (DOWN, UP)
    assert (group.block, group.tokens, group.n_expert) == (0, (100, 10, 0, 50), 4)
    assert (group.least, group.median, group.unseen, group.short, group.usable) == (0, 30, 1, 2, True)


def test_blocks_come_in_the_models_order() -> None:
    names = [f"blk.{i}.ffn_up_exps.weight" for i in (10, 2, 1)]
    imatrix = Imatrix({n: np.ones((2, 3)) for n in names}, {n: np.ones(2) for n in names})
    assert [group.block for group in coverage(imatrix)] == [1, 2, 10]


def test_a_layer_without_tokens_is_listed_and_left_at_zero() -> None:
    shrunk = shrink_experts(moe([0.0, 0.0]), 100)
    (group,) = coverage(shrunk, min_tokens=100)
    assert (group.unseen, group.short, group.usable) == (2, 2, False)
    assert not shrunk.sums[UP].any()
    assert not shrunk.counts[UP].any()


def test_an_expert_is_mixed_with_its_layers_mean_by_its_tokens() -> None:
    raw, shrunk = moe(), shrink_experts(moe(), 40)
    layer = raw.sums[UP].sum(axis=0) / raw.counts[UP].sum()
    for expert, n in enumerate(TOKENS):
        own = mean(raw, UP)[expert] if n else 0.0
        np.testing.assert_allclose(mean(shrunk, UP)[expert], n / (n + 40) * own + 40 / (n + 40) * layer)
    assert shrunk.counts[UP].tolist() == [140, 50, 40, 90]


def test_an_expert_with_many_tokens_knows_of_what_only_others_have_met() -> None:
    raw = moe([4000.0, 10.0, 0.0, 3000.0])
    massive = {name: np.array(raw.sums[name]) for name in (UP, DOWN)}
    massive[DOWN][3, 2] += 3e7
    found = mean(shrink_experts(Imatrix({**raw.sums, **massive}, raw.counts), 256), DOWN)
    assert (found[:, 2] > 100 * found[:, 1]).all()


def test_dense_weights_stay_as_they_are() -> None:
    raw, shrunk = moe(), shrink_experts(moe(), 40)
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k_b.weight"):
        assert np.array_equal(shrunk.sums[name], raw.sums[name])
        assert np.array_equal(shrunk.counts[name], raw.counts[name])


def test_coverage_of_a_shrunk_imatrix_is_that_of_the_raw_one(tmp_path: Path) -> None:
    write_imatrix(shrink_experts(moe(), 1000), tmp_path / "i.gguf")
    assert coverage(read_imatrix(tmp_path / "i.gguf"), min_tokens=60) == coverage(moe(), min_tokens=60)


@pytest.mark.parametrize("min_tokens", [0, 1, 40, 1000])
def test_raw_sums_are_recovered(tmp_path: Path, min_tokens: int) -> None:
    shrunk = shrink_experts(moe(), min_tokens)
    write_imatrix(shrunk, tmp_path / "i.gguf")
    # To the rounding of what is stored: an expert's own part may be small in a sum that is mostly its layer's.
    for given, rounding in ((shrunk, 4e-15), (read_imatrix(tmp_path / "i.gguf"), 3e-7)):
        raw = unshrunk(given)
        for name in raw.sums:
            assert np.array_equal(raw.counts[name], moe().counts[name])
            assert (np.abs(raw.sums[name] - moe().sums[name]) <= rounding * shrunk.sums[name]).all()


def test_shrinking_twice_is_shrinking_once() -> None:
    once, twice = shrink_experts(moe(), 70), shrink_experts(shrink_experts(moe(), 400), 70)
    np.testing.assert_allclose(twice.sums[UP], once.sums[UP])
    assert np.array_equal(twice.counts[UP], once.counts[UP])
    assert np.array_equal(twice.seen[UP], moe().counts[UP])
