"""What feedback reads of a tensor: factors of its input's covariance, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dynrun.calibration.covariance import Covariance, CovarianceSums, Unit
from dynrun.calibration.experts import shrink_experts
from dynrun.calibration.imatrix import Imatrix
from dynrun.errors import DoesNotFitError
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp.graph import Activation
from dynrun.rounding.settings import FeedbackSettings
from dynrun.rounding.source import Source
from tests.tiny import write_tiny_llama

NAME, UP = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"
N = 256


def source(folder: Path, memory: int | None) -> Source:
    sums = CovarianceSums([Unit(NAME, N, 0, 1)])
    sums.begin(0)
    x = np.random.default_rng(1).standard_normal((600, N)).astype(np.float32)
    sums.take(Activation(NAME, x, None))
    sums.write(folder)
    weights = WeightFile(write_tiny_llama(folder / "tiny.gguf"))
    imatrix = Imatrix({NAME: np.ones((1, N))}, {NAME: np.array([600.0])})
    return Source(weights, imatrix, Covariance(folder, {NAME: NAME}), FeedbackSettings(), memory=memory)


def test_less_memory_keeps_fewer_factors_and_gives_the_same(tmp_path: Path) -> None:
    usual, tight = (source(tmp_path, memory) for memory in (None, 6 * 4 * N * N))
    for wanted in (usual, tight):
        wanted.factor(NAME, 0, 0.5, 256)
    first, again = usual.factor(NAME, 0, 2.0, 32), tight.factor(NAME, 0, 2.0, 32)
    assert first.r.equal(again.r)
    assert first.h.equal(again.h)
    assert (len(usual._factors), len(tight._factors)) == (2, 1)


def test_too_little_memory_is_told_with_what_is_enough(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError, match=rf"rounding {NAME} takes .* give --memory 2M"):
        source(tmp_path, 10**6).factor(NAME, 0, 1.0, 256)
    source(tmp_path, 2 * 10**6).factor(NAME, 0, 1.0, 256)


def test_an_experts_covariance_is_mixed_with_its_layers_as_the_imatrix_is(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    inputs = {expert: random.standard_normal((n, N)).astype(np.float32) for expert, n in ((0, 500), (1, 40), (3, 700))}
    # As of two passes.
    for unit in (Unit(UP, N, 0, 1), Unit(UP, N, 1, 4)):
        sums = CovarianceSums([unit])
        sums.begin(0)
        for expert, x in inputs.items():
            sums.take(Activation(UP, x, np.full(len(x), expert, np.int32)))
        sums.write(tmp_path)
    seen = np.array([500.0, 40.0, 0.0, 700.0])
    raw = Imatrix({UP: np.ones((4, N)) * (seen > 0)[:, None]}, {UP: seen})
    weights = WeightFile(write_tiny_llama(tmp_path / "tiny.gguf", n_expert=4, n_block=1))
    for n_added in (0, 100):
        imatrix = shrink_experts(raw, n_added) if n_added else raw
        found = Source(weights, imatrix, Covariance(tmp_path, {UP: UP}), FeedbackSettings())
        layer = sum(x.T @ x for x in inputs.values()) / seen.sum()
        for expert, n in enumerate(seen):
            own = inputs[expert].T @ inputs[expert] if n else np.zeros((N, N), np.float32)
            matrix, n_rows = found._mixed(UP, expert)
            np.testing.assert_allclose(matrix, own + n_added * layer, rtol=1e-4, atol=1e-2)
            assert n_rows == n + n_added
