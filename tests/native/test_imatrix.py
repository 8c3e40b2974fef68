"""The imatrix: llama-imatrix is the oracle, on the same token chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dynrun.calibration.dataset import builtin
from dynrun.calibration.imatrix import Imatrix, collect, read_imatrix, write_imatrix
from dynrun.errors import DynrunError
from dynrun.llamacpp import tools
from dynrun.llamacpp.engine import Engine
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
N_CTX = 128


def oracle(model: Path, folder: Path, n_characters: int) -> tuple[Imatrix, Imatrix]:
    """Ours and llama-imatrix's on the same chunks."""
    text = folder / "text.txt"
    conversations = [c for c in builtin().conversations if c.language == "en"]
    text.write_text("\n".join(str(m["content"]) for c in conversations for m in c.messages)[:n_characters])
    tools.collect_imatrix(
        model, text, folder / "theirs.gguf", n_ctx=N_CTX, n_threads=2, parse_special=True, process_output=True
    )
    with Engine.open(model, n_ctx=N_CTX, n_threads=2) as engine:
        tokens = engine.tokenize(text.read_text(), parse_special=True, add_special=True)
        chunks = [tokens[i : i + N_CTX] for i in range(0, len(tokens) - N_CTX + 1, N_CTX)]
        ours = collect(engine, chunks)
    write_imatrix(ours, folder / "ours.gguf", dataset="x", chunk_count=len(chunks), chunk_size=N_CTX)
    return read_imatrix(folder / "ours.gguf"), read_imatrix(folder / "theirs.gguf")


def assert_same(ours: Imatrix, theirs: Imatrix) -> None:
    assert set(theirs.sums) <= set(ours.sums)
    assert theirs.sums
    for name in theirs.sums:
        assert np.array_equal(ours.counts[name], theirs.counts[name]), name
        assert np.allclose(ours.sums[name], theirs.sums[name], rtol=1e-4, atol=0), name


@pytest.mark.parametrize("n_expert", [0, 4])
def test_every_entry_is_llama_imatrixs(tmp_path: Path, n_expert: int) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf", n_expert=n_expert)
    ours, theirs = oracle(model, tmp_path, 2000)
    assert_same(ours, theirs)
    assert any(len(counts) == n_expert for counts in theirs.counts.values()) is bool(n_expert)


def test_every_entry_is_llama_imatrixs_on_a_real_model(demo_model: Path, tmp_path: Path) -> None:
    ours, theirs = oracle(demo_model, tmp_path, 4000)
    assert_same(ours, theirs)
    assert set(theirs.sums) == set(ours.sums)
    assert len(theirs.sums) == 211


def test_llama_quantize_takes_it(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    with Engine.open(model, n_ctx=N_CTX, n_threads=2) as engine:
        imatrix = collect(engine, [list(range(3, 99))])
    write_imatrix(imatrix, tmp_path / "i.gguf", dataset="builtin", chunk_count=1, chunk_size=N_CTX)
    done = tools.quantize(model, "out.gguf", "IQ2_XXS", folder=tmp_path, n_threads=2, imatrix="i.gguf")
    assert "have 15 importance matrix entries" in done.stdout
    assert "did not find weights for blk" not in done.stdout


def test_experts_that_saw_nothing_count_as_ones() -> None:
    imatrix = Imatrix({"w": np.array([[4.0, 8.0], [0.0, 0.0]])}, {"w": np.array([2.0, 0.0])})
    mean = imatrix.mean("w")
    assert mean is not None
    assert mean.tolist() == [[2.0, 4.0], [1.0, 1.0]]
    assert imatrix.mean("unknown") is None


def test_a_model_is_no_imatrix(tmp_path: Path) -> None:
    with pytest.raises(DynrunError, match="no imatrix"):
        read_imatrix(write_tiny_llama(tmp_path / "tiny.gguf"))


def test_a_truncated_file_is_no_imatrix(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    path.write_bytes(write_tiny_llama(tmp_path / "tiny.gguf").read_bytes()[:100])
    with pytest.raises(DynrunError, match="no imatrix"):
        read_imatrix(path)
