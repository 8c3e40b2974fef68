"""The built-in models are the packaged model: the same function in another basis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dynrun.calibration.dataset import builtin
from dynrun.calibration.sequences import Tokenizer, beginnings
from dynrun.calibration.splits import split
from dynrun.calibration.text import template_for
from dynrun.demo import builtin as demo
from dynrun.demo.rebase import dequantized, random_basis, rebase
from dynrun.llamacpp import tools
from dynrun.llamacpp.engine import Engine
from dynrun.scoring.divergence import divergence

pytestmark = pytest.mark.native
PROMPTS = (
    *("The capital of France is", "def fibonacci(n):", "Once upon a time, in a small village,", "Water boils at"),
    *("The three laws of motion are", "Dear Sir or Madam,", "1 + 1 =", "In 1969, the first"),
)


@pytest.fixture(scope="module")
def original(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model dequantized to F32: its own kernels would quantize activations."""
    path = tmp_path_factory.mktemp("original") / "original-F32.gguf"
    dequantized(demo_model.parent.parent / demo.original_name(), path)
    return path


def mean_kld(reference: Path, other: Path) -> float:
    with Engine.open(reference, n_ctx=128, n_threads=2) as engine, template_for(engine) as template:
        parts = beginnings(Tokenizer(engine, template, 128), split(builtin().conversations, "test"), max_tokens=1024)
        logits = [engine.logits(part.tokens) for part in parts]
    with Engine.open(other, n_ctx=128, n_threads=2) as engine:
        return float(
            np.mean([divergence(z, engine.logits(p.tokens)).kld.mean() for z, p in zip(logits, parts, strict=True)])
        )


def test_a_rebased_f32_is_the_same_function(demo_model: Path, original: Path, tmp_path: Path) -> None:
    rebased = tmp_path / "rebased-F32.gguf"
    rebase(demo_model.parent.parent / demo.original_name(), rebased, dtype="F32")
    assert mean_kld(original, rebased) < 1e-6
    for prompt in PROMPTS:
        one, other = (tools.complete(path, prompt, n_predict=64, n_threads=2) for path in (original, rebased))
        assert one == other, prompt


def test_the_f16_reference_stands_close_to_it(demo_model: Path, original: Path) -> None:
    assert mean_kld(original, demo_model) < 1e-4


def test_the_mixture_of_experts_is_the_same_function(demo_moe_model: Path, original: Path) -> None:
    assert mean_kld(original, demo_moe_model) < 1e-3


def test_the_basis_is_an_isometry_and_always_the_same() -> None:
    basis = random_basis(576)
    assert (basis.n, basis.wide) == (576, 768)
    r = basis.right(np.eye(576))
    assert np.allclose(r @ r.T, np.eye(576), atol=1e-12)
    assert np.array_equal(random_basis(576).blocks, basis.blocks)
