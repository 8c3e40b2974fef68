"""The imatrix: llama-imatrix is the oracle, on the same token chunks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dynrun.calibration.collect import Batch, Checkpoint, SquareSums, inputs_of, run_pass
from dynrun.calibration.dataset import builtin
from dynrun.calibration.imatrix import Imatrix, read_imatrix, write_imatrix
from dynrun.errors import DynrunError
from dynrun.llamacpp import tools
from dynrun.llamacpp.engine import Engine
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
N_CTX = 128


def collect(engine: Engine, batches: Sequence[Batch], folder: Path) -> Imatrix:
    """Σx² over ``batches``."""
    sums = SquareSums(inputs_of(engine))
    run_pass(engine, batches, [sums], Checkpoint(folder / "state.npz"))
    return sums.imatrix(engine.input_of)


def oracle(model: Path, folder: Path, n_characters: int) -> tuple[Imatrix, Imatrix]:
    """Ours and llama-imatrix's on the same chunks."""
    text = folder / "text.txt"
    conversations = [c for c in builtin().conversations if c.language == "en"]
    text.write_text("\n".join(str(m["content"]) for c in conversations for m in c.messages)[:n_characters])
    settings = {"parse_special": True, "process_output": True, "repack": False}
    tools.collect_imatrix(model, text, folder / "theirs.gguf", n_ctx=N_CTX, n_threads=2, **settings)
    with Engine.open(model, n_ctx=N_CTX, n_threads=2) as engine:
        tokens = engine.tokenize(text.read_text(), parse_special=True, add_special=True)
        chunks = [tokens[i : i + N_CTX] for i in range(0, len(tokens) - N_CTX + 1, N_CTX)]
        ours = collect(engine, [[chunk] for chunk in chunks], folder)
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
        imatrix = collect(engine, [[list(range(3, 99))]], tmp_path)
    write_imatrix(imatrix, tmp_path / "i.gguf", dataset="builtin", chunk_count=1, chunk_size=N_CTX)
    done = tools.quantize(model, "out.gguf", "IQ2_XXS", folder=tmp_path, n_threads=2, imatrix="i.gguf")
    assert "have 15 importance matrix entries" in done.stdout
    assert "did not find weights for blk" not in done.stdout


def test_sequences_that_share_a_batch_do_not_see_each_other(tmp_path: Path) -> None:
    # No experts: a rounding may send a token to another one.
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    parts = [list(range(3, 60)), list(range(200, 90, -3)), list(range(40, 200, 7))]
    with Engine.open(model, n_ctx=256, n_threads=2, n_seq_max=4) as engine:
        together = collect(engine, [parts], tmp_path)
        apart = collect(engine, [[part] for part in parts], tmp_path)
        joined = collect(engine, [[[token for part in parts for token in part]]], tmp_path)
    for name in apart.sums:
        assert np.array_equal(together.counts[name], apart.counts[name]), name
        # Attention sums its values in F16, in another order where the cache holds other sequences too.
        assert np.allclose(together.sums[name], apart.sums[name], rtol=6e-3), name
    # Were they one text, attention would tell.
    name = "blk.0.attn_output.weight"
    assert not np.allclose(joined.sums[name], apart.sums[name], rtol=1e-2)


def test_weights_with_one_input_are_collected_once(tmp_path: Path) -> None:
    with Engine.open(write_tiny_llama(tmp_path / "tiny.gguf", n_expert=4), n_ctx=64, n_threads=2) as engine:
        taken: list[str] = []
        engine.watch_inputs([list(range(3, 40))], lambda activation: taken.append(activation.weight))
        input_of = engine.input_of
    assert len(taken) == len(set(taken)) == len(set(input_of.values()))
    for block in ("blk.0", "blk.1"):
        qkv = {input_of[f"{block}.attn_{which}.weight"] for which in "qkv"}
        assert len(qkv) == 1
        assert input_of[f"{block}.ffn_gate_exps.weight"] == input_of[f"{block}.ffn_up_exps.weight"]
        assert input_of[f"{block}.ffn_down_exps.weight"] == f"{block}.ffn_down_exps.weight"


def test_logits_are_whole_again_after_a_pass_that_left_them_out(tmp_path: Path) -> None:
    tokens = list(range(3, 40))
    with Engine.open(write_tiny_llama(tmp_path / "tiny.gguf"), n_ctx=64, n_threads=2) as engine:
        before = engine.logits(tokens)
        engine.watch_inputs([tokens], lambda _: None)
        assert np.array_equal(engine.logits(tokens), before)


def test_activations_that_are_not_finite_end_in_one_line(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    with Engine.open(model, n_ctx=64, n_threads=2) as engine:
        # Finite, but what comes of it is not.
        bad = np.full(256, 3e38, dtype=np.float32)
        with engine.replaced("blk.1.ffn_norm.weight", bad):
            sums = SquareSums(inputs_of(engine))
            run_pass(engine, [[list(range(3, 40))]], [sums], Checkpoint(tmp_path / "state.npz"))
    with pytest.raises(DynrunError, match=r"blk\.1\.ffn_(gate|up)\.weight in .*tiny\.gguf are not finite"):
        sums.check(model)


def test_a_model_is_no_imatrix(tmp_path: Path) -> None:
    with pytest.raises(DynrunError, match="no imatrix"):
        read_imatrix(write_tiny_llama(tmp_path / "tiny.gguf"))


def test_a_truncated_file_is_no_imatrix(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    path.write_bytes(write_tiny_llama(tmp_path / "tiny.gguf").read_bytes()[:100])
    with pytest.raises(DynrunError, match="no imatrix"):
        read_imatrix(path)
