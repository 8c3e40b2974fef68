"""What quantized activations cost, against llama.cpp's own arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dynrun.calibration.imatrix import Imatrix
from dynrun.calibration.sequences import TokenSequence
from dynrun.gguf.tensor_types import DEFAULT_MENU, TENSOR_TYPES
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp.engine import Engine
from dynrun.llamacpp.library import ggml
from dynrun.sensitivity.errors import Quantizer
from dynrun.sensitivity.kernels import _in_8_bits, activation_block, relative_costs
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native

SEQUENCES = [TokenSequence("one", "chat", tuple(range(3, 43))), TokenSequence("two", "chat", tuple(range(60, 90)))]


def test_blocks_of_32_are_rounded_as_q8_0_is() -> None:
    x = np.random.default_rng(0).standard_normal((5, 256)).astype(np.float32)
    q8_0 = TENSOR_TYPES["Q8_0"].ggml_id
    theirs = ggml().dequantize(q8_0, ggml().quantize(q8_0, x, None), *x.shape)
    # Their scale is stored as float16.
    assert np.abs(_in_8_bits(x, 32) - theirs).max() < 2e-3 * np.abs(x).max()
    lost = np.square(_in_8_bits(x, 32) - x).sum()
    assert lost == pytest.approx(np.square(theirs - x).sum(), rel=0.05)


def test_a_massive_value_costs_its_block_of_256_and_no_other_block_of_32() -> None:
    x = np.random.default_rng(0).standard_normal((1, 256)).astype(np.float32)
    x[0, 0] = 500.0
    assert np.square(_in_8_bits(x, 256) - x)[0, 32:].mean() > 100 * np.square(_in_8_bits(x, 32) - x)[0, 32:].mean()


def test_every_type_of_the_menu_has_its_kernels_block() -> None:
    blocks = {name: activation_block(name) for name in DEFAULT_MENU}
    assert {name for name, block in blocks.items() if block == 32} == {
        *("IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    }
    assert {name for name, block in blocks.items() if block == 0} == {"F16"}


def test_weights_that_multiply_have_costs_and_a_lookup_has_none(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    quantizer = Quantizer(WeightFile(path), Imatrix({}, {}), 1)
    with Engine.open(path, n_ctx=64, n_threads=1) as engine:
        names = [n for n, w in engine.weights.items() if len(w.shape) > 1 and w.shape[0] % 32 == 0]
        found = relative_costs(engine, quantizer, SEQUENCES, dict.fromkeys(names, "Q4_0"))
    assert "token_embd.weight" in names
    assert "token_embd.weight" not in found
    attended = [name for name in found if name.startswith("blk.")]
    assert attended
    for name in attended:
        assert 0 < found[name][32] < 1, name
        # A wider block never has a finer scale.
        assert found[name].get(256, 1.0) >= found[name][32], name
