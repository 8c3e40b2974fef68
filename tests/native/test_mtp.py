"""MTP blocks: found, run behind the model's own decode, their inputs seen; and where they cannot be run, no harm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from dynrun.calibration.collect import Checkpoint, SquareSums, inputs_of, run_pass
from dynrun.calibration.imatrix import write_imatrix
from dynrun.gguf.header import read_header
from dynrun.gguf.quantizable import candidate_types, is_mtp, quantizable
from dynrun.gguf.tensor_types import DEFAULT_MENU, TENSOR_TYPES
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp import mtp, tools
from dynrun.llamacpp.engine import Engine, Tokens
from tests.tiny import write_tiny_llama
from tests.tiny_mtp import write_tiny_mtp

pytestmark = pytest.mark.native
Inputs = dict[str, npt.NDArray[np.float32]]
LONG, SHORT = [3 + 7 * i % 250 for i in range(300)], [200, 9, 33, 120, 121, 4, 4, 250, 17, 60]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_mtp(tmp_path_factory.mktemp("mtp") / "tiny.gguf")


def opened(path: Path) -> Engine:
    return Engine.open(path, n_ctx=512, n_threads=2, n_seq_max=4, mtp=True)


def inputs(engine: Engine, batch: Sequence[Tokens]) -> Inputs:
    """Every input, its parts joined."""
    parts: dict[str, list[npt.NDArray[np.float32]]] = {}
    engine.watch_inputs(batch, lambda activation: parts.setdefault(activation.weight, []).append(activation.x))
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def normalised(x: npt.NDArray[np.float32], weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-5)) * weight


@pytest.mark.parametrize(("n_mtp", "n_expert"), [(1, 0), (2, 0), (2, 4)])
def test_the_weights_of_every_mtp_block_are_found_and_their_inputs_seen(
    tmp_path: Path, n_mtp: int, n_expert: int
) -> None:
    with opened(write_tiny_mtp(tmp_path / "tiny.gguf", n_mtp=n_mtp, n_expert=n_expert)) as engine:
        assert engine.mtp_missing == ""
        seen = inputs(engine, [LONG, SHORT])
        own = {name for name in quantizable(engine.header) if is_mtp(name, engine.header.metadata)}
        assert len(own) == n_mtp * (11 if n_expert else 8)
        assert own <= set(engine.weights)
        for name in own:
            n_rows = (len(LONG) + len(SHORT)) * (2 if "_exps" in name else 1)
            assert seen[engine.input_of[name]].shape == (n_rows, engine.weights[name].shape[0]), name
            assert np.isfinite(seen[engine.input_of[name]]).all()
        # Blocks that follow one another share nothing, though the same graph runs them.
        assert all(engine.input_of[name].split(".")[1] == name.split(".")[1] for name in own)


@pytest.mark.parametrize("head", [0, 1])
def test_a_block_starts_from_its_token_and_the_state_before_it(tmp_path: Path, head: int) -> None:
    """Computed from the file's weights and the input of output.weight, which is the hidden state in hy_v3."""
    path = write_tiny_mtp(tmp_path / "tiny.gguf", n_mtp=2)
    with opened(path) as engine:
        seen = inputs(engine, [LONG, SHORT])
    weights, block = WeightFile(path), f"blk.{2 + head}.nextn"
    enorm, hnorm = (weights.rows(f"{block}.{which}.weight").reshape(-1) for which in ("enorm", "hnorm"))
    states = seen["output.weight"]
    before = np.roll(states, 1, axis=0)
    before[[0, len(LONG)]] = 0
    embeddings = weights.rows("token_embd.weight")[LONG + SHORT]
    expected = np.concatenate([normalised(embeddings, enorm), normalised(before, hnorm)], axis=1)
    assert np.allclose(seen[f"{block}.eh_proj.weight"], expected, rtol=1e-4, atol=1e-5)


def test_sequences_that_share_a_batch_do_not_see_each_other(path: Path) -> None:
    with opened(path) as engine:
        together = inputs(engine, [LONG, SHORT])
        apart = [inputs(engine, [tokens]) for tokens in (LONG, SHORT)]
    for name, x in together.items():
        first, second = (one[name] for one in apart)
        assert np.array_equal(x[: len(first)], first), name
        # Attention sums its values in F16, in another order where the cache holds another sequence before.
        assert np.linalg.norm(x[len(first) :] - second) < 3e-3 * np.linalg.norm(second), name


def test_the_parts_of_a_long_sequence_see_what_came_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as engine:
        two = inputs(engine, [LONG])
    monkeypatch.setattr(mtp, "_MAX_BATCH", 64)
    with opened(path) as engine:
        five = inputs(engine, [LONG])
    for name, x in two.items():
        assert np.linalg.norm(x - five[name]) < 1e-5 * np.linalg.norm(x), name


def test_the_shared_output_counts_each_token_once_and_as_without_the_block(path: Path, tmp_path: Path) -> None:
    with opened(path) as engine:
        seen = inputs(engine, [LONG])
    with opened(write_tiny_mtp(tmp_path / "trunk.gguf", without="nextn")) as engine:
        trunk = inputs(engine, [LONG])
    assert set(trunk) == {name for name in seen if not name.startswith("blk.2.")}
    assert all(np.array_equal(seen[name], x) for name, x in trunk.items())


def test_only_what_is_asked_for_is_given(path: Path) -> None:
    taken: list[str] = []
    with opened(path) as engine:
        for only in (["blk.2.attn_output.weight"], ["blk.0.attn_output.weight"], ["output.weight"]):
            engine.watch_inputs([SHORT], lambda activation: taken.append(activation.weight), only=only)
    assert taken == ["blk.2.attn_output.weight", "blk.0.attn_output.weight", "output.weight"]


def test_logits_are_those_of_the_model_without_the_block(path: Path, tmp_path: Path) -> None:
    with opened(write_tiny_mtp(tmp_path / "trunk.gguf", without="nextn")) as engine:
        trunk = engine.logits(SHORT)
    with opened(path) as engine:
        before = engine.logits(SHORT)
        engine.watch_inputs([LONG], lambda _: None)
        prefix, _ = engine.record(SHORT, range(len(SHORT)))
        assert np.array_equal(before, trunk)
        assert np.array_equal(engine.logits(SHORT), trunk)
        assert np.array_equal(engine.resume(prefix, 0), trunk)


def test_an_exception_in_a_hook_reaches_the_caller(path: Path) -> None:
    def fail(activation: object) -> None:
        raise RuntimeError("from the hook")

    with opened(path) as engine:
        before = inputs(engine, [SHORT])
        with pytest.raises(RuntimeError, match="from the hook"):
            engine.watch_inputs([SHORT], fail, only=["blk.2.attn_output.weight"])
        after = inputs(engine, [SHORT])
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_llama_quantize_takes_the_entries_and_the_menu_keeps_mtp_at_four_bits(path: Path, tmp_path: Path) -> None:
    with opened(path) as engine:
        sums = SquareSums(inputs_of(engine))
        run_pass(engine, [[LONG, SHORT]], [sums], Checkpoint(tmp_path / "state.npz"))
        imatrix = sums.imatrix(engine.input_of)
        header = engine.header
    own = {name: tensor for name, tensor in quantizable(header).items() if is_mtp(name, header.metadata)}
    assert set(own) <= set(imatrix.sums)
    write_imatrix(imatrix, tmp_path / "i.gguf", dataset="x", chunk_count=1, chunk_size=512)
    done = tools.quantize(path, "out.gguf", "IQ2_XXS", folder=tmp_path, n_threads=2, imatrix="i.gguf")
    assert "did not find weights for blk" not in done.stdout
    types = {t for tensor in own.values() for t in candidate_types(tensor, DEFAULT_MENU, imatrix.sums, header.metadata)}
    assert "Q4_K" in types
    assert min(TENSOR_TYPES[t].bpw for t in types) >= 4.5


# -- where they cannot be run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("without", ["nextn", "blk.2."])
def test_a_model_without_its_block_is_loaded_all_the_same(tmp_path: Path, without: str) -> None:
    with opened(write_tiny_mtp(tmp_path / "tiny.gguf", without=without)) as engine:
        assert engine.mtp_missing.endswith("is missing")
        assert not [name for name in inputs(engine, [SHORT]) if name.startswith("blk.2.")]
        assert np.isfinite(engine.logits(SHORT)).all()


def test_without_a_second_context_the_model_is_loaded_without_its_block(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mtp.MtpRunner, "open", lambda *_: None)
    with opened(path) as engine:
        assert engine.mtp_missing.startswith("llama.cpp makes no context for the MTP blocks")
        assert not [name for name in inputs(engine, [SHORT]) if name.startswith("blk.2.")]


@pytest.fixture
def foreign_build(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on Windows: the functions have other names."""
    monkeypatch.setattr(mtp, "_FUNCTIONS", {"?llama_set_embeddings_nextn@@YAXPEAUllama_context@@_N1@Z": (None, ())})
    mtp._functions.cache_clear()
    yield
    mtp._functions.cache_clear()


@pytest.mark.usefixtures("foreign_build")
def test_a_build_without_the_functions_loads_the_model_without_its_block(path: Path) -> None:
    with opened(path) as engine:
        assert "exports no functions for MTP" in engine.mtp_missing
        assert not [name for name in inputs(engine, [SHORT]) if name.startswith("blk.2.")]


@pytest.mark.parametrize(
    ("architecture", "n_mtp", "reason"),
    [
        ("exaone-moe", 1, "llama.cpp has no MTP graph for exaone-moe"),
        ("qwen35", 2, "llama.cpp's MTP graph for qwen35 runs one block, the model has 2"),
        ("glm4moe", 1, "blk.2.ffn_gate_inp.weight is missing"),
        ("mimo2", 1, "blk.2.attn_qkv.weight is missing"),
    ],
)
def test_what_would_abort_is_not_tried(path: Path, architecture: str, n_mtp: int, reason: str) -> None:
    metadata = {
        "general.architecture": architecture,
        f"{architecture}.block_count": 3,
        f"{architecture}.nextn_predict_layers": n_mtp,
    }
    assert mtp.why_not(replace(read_header(path), metadata=metadata)) == reason


def test_a_model_without_mtp_blocks_misses_none(tmp_path: Path) -> None:
    with opened(write_tiny_llama(tmp_path / "tiny.gguf")) as engine:
        assert engine.mtp_missing == ""
        assert len(inputs(engine, [SHORT])) == 9
