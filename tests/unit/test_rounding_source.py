"""What feedback reads of a tensor: factors of its input's covariance, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dynrun.calibration.covariance import Covariance, CovarianceSums, Unit
from dynrun.calibration.imatrix import Imatrix
from dynrun.errors import DoesNotFitError
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp.graph import Activation
from dynrun.rounding.settings import FeedbackSettings
from dynrun.rounding.source import Source
from tests.tiny import write_tiny_llama

NAME = "blk.0.attn_q.weight"
N = 256


def source(folder: Path, memory: int | None) -> Source:
    sums = CovarianceSums([Unit(NAME, N, 0, 1)])
    sums.begin(0)
    x = np.random.default_rng(1).standard_normal((600, N)).astype(np.float32)
    sums.take(Activation(NAME, x, None))
    sums.write(folder)
    weights = WeightFile(write_tiny_llama(folder / "tiny.gguf"))
    return Source(weights, Imatrix({}, {}), Covariance(folder, {NAME: NAME}), FeedbackSettings(), memory=memory)


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
