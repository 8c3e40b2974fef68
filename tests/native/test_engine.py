"""The engine: logits, inputs of weights, replace and restore, going on from the middle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dynrun.errors import DynrunError, NotFoundError
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.weights import WeightFile, encode
from dynrun.llamacpp.engine import Engine, Piece
from dynrun.scoring.divergence import divergence
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
TOKENS = [5, 70, 71, 200, 9, 33, 120, 121, 4, 4, 250, 17, 60, 61, 62, 63]


@pytest.fixture(scope="module", params=["dense", "experts", "tied"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return write_tiny_llama(
        folder / "tiny.gguf", n_block=3, n_expert=4 if request.param == "experts" else 0, tied=request.param == "tied"
    )


def test_every_quantizable_weight_is_found_in_the_graph(path: Path) -> None:
    with Engine.open(path, n_ctx=64, n_threads=2) as engine:
        assert set(quantizable(engine.header)) <= set(engine.weights)


def test_a_decode_leaves_nothing_behind(path: Path) -> None:
    with Engine.open(path, n_ctx=64, n_threads=2) as engine:
        first = engine.logits(TOKENS)
        engine.logits(TOKENS[::-1])
        assert np.array_equal(engine.logits(TOKENS), first)
        assert first.shape == (len(TOKENS), engine.n_vocab)


def test_only_the_positions_asked_for_are_given_in_their_order(path: Path) -> None:
    with Engine.open(path, n_ctx=64, n_threads=2) as engine:
        every = engine.logits(TOKENS)
        some = engine.logits(TOKENS, [3, 15, 7])
        assert divergence(every[[3, 15, 7]], some).kld.max() < 1e-9


@pytest.mark.parametrize("n_rows", [1, 5, 16, 40])
def test_logits_in_blocks_are_those_of_one_decode(path: Path, n_rows: int) -> None:
    outputs = [1, 2, 3, 11, 15]
    with Engine.open(path, n_ctx=64, n_threads=2, n_batch=n_rows) as engine:
        blocks = [block.copy() for block in engine.logit_blocks(TOKENS, outputs, n_rows)]
    assert max(map(len, blocks)) <= n_rows
    with Engine.open(path, n_ctx=64, n_threads=2) as engine:
        assert divergence(engine.logits(TOKENS, outputs), np.concatenate(blocks)).kld.max() < 1e-4


def test_sequences_go_on_from_what_is_in_memory(path: Path) -> None:
    with Engine.open(path, n_ctx=64, n_threads=2, n_seq_max=2) as engine:
        whole = [engine.logits(tokens, [14, 15]) for tokens in (TOKENS, TOKENS[::-1])]
        engine.forget()
        assert len(engine.extend([Piece(0, 0, TOKENS[:14], ()), Piece(1, 0, TOKENS[:1:-1], ())])) == 0
        rows = engine.extend([Piece(0, 14, TOKENS[14:], (0, 1)), Piece(1, 14, TOKENS[1::-1], (0, 1))])
        assert divergence(np.concatenate(whole), rows).kld.max() < 1e-4


def test_every_weight_can_be_replaced_and_is_restored(path: Path) -> None:
    weights = WeightFile(path)
    with Engine.open(path, n_ctx=64, n_threads=2) as engine:
        before = engine.logits(TOKENS)
        for name in quantizable(engine.header):
            changed = encode(weights.rows(name) * np.float32(0.5), "F16")
            stored = engine.read(name)
            with engine.replaced(name, changed):
                assert divergence(before, engine.logits(TOKENS)).kld.mean() > 1e-7, name
            assert np.array_equal(engine.read(name), stored)
        assert np.array_equal(engine.logits(TOKENS), before)


def test_a_weight_is_restored_after_an_error(path: Path) -> None:
    with Engine.open(path, n_ctx=64, n_threads=2) as engine:
        stored = engine.read("token_embd.weight")
        with pytest.raises(KeyError), engine.replaced("token_embd.weight", np.zeros_like(stored)):
            raise KeyError
        assert np.array_equal(engine.read("token_embd.weight"), stored)


def test_replacing_by_another_size_is_refused(path: Path) -> None:
    nothing = np.zeros(3, dtype=np.uint8)
    with (
        Engine.open(path, n_ctx=64, n_threads=2) as engine,
        pytest.raises(ValueError, match="bytes for a tensor"),
        engine.replaced("token_embd.weight", nothing),
    ):
        pass


def test_the_same_bytes_in_a_file_give_the_same_logits_as_in_place(path: Path, tmp_path: Path) -> None:
    """Replacing in place is what it claims: the file with that weight, loaded."""
    name = "blk.1.attn_output.weight"
    data = path.read_bytes()
    weights = WeightFile(path)
    tensor = weights.header.tensors[name]
    changed = encode(weights.rows(name) * np.float32(1.5), "F16")
    start = weights.header.data_offset + tensor.offset
    other = tmp_path / "other.gguf"
    other.write_bytes(data[:start] + changed.tobytes() + data[start + tensor.nbytes :])
    with Engine.open(other, n_ctx=64, n_threads=2) as engine:
        loaded = engine.logits(TOKENS)
    with Engine.open(path, n_ctx=64, n_threads=2) as engine, engine.replaced(name, changed):
        assert np.array_equal(engine.logits(TOKENS), loaded)


@pytest.mark.parametrize("layer", [0, 1])
def test_going_on_from_a_layer_is_a_full_decode(path: Path, layer: int) -> None:
    weights = WeightFile(path)
    with Engine.open(path, n_ctx=64, n_threads=2) as engine:
        prefix, logits = engine.record(TOKENS, range(len(TOKENS)))
        assert divergence(logits, engine.resume(prefix, layer)).kld.max() < 1e-9
        name = f"blk.{layer + 1}.attn_k.weight"
        with engine.replaced(name, encode(weights.rows(name) * np.float32(0.3), "F16")):
            whole = engine.logits(TOKENS)
            assert divergence(logits, whole).kld.mean() > 1e-7
            assert divergence(whole, engine.resume(prefix, layer)).kld.max() < 1e-9
        assert np.array_equal(engine.logits(TOKENS), logits)


def test_inputs_of_every_multiplied_weight_are_seen(path: Path) -> None:
    seen: dict[str, int] = {}
    with Engine.open(path, n_ctx=64, n_threads=2) as engine:
        experts = {n: w.shape[2] for n, w in engine.weights.items() if len(w.shape) > 2}

        def take(activation: object) -> None:
            name = activation.weight  # type: ignore[attr-defined]
            seen[name] = seen.get(name, 0) + len(activation.x)  # type: ignore[attr-defined]

        engine.watch_inputs([TOKENS], take)
        seen = {name: seen[first] for name, first in engine.input_of.items()}
        wanted = set(quantizable(engine.header))
        if "output.weight" in engine.weights:
            wanted -= {"token_embd.weight"}
        # Routers are multiplied too, though never quantized.
        assert wanted <= set(seen)
        assert all(n == len(TOKENS) * (2 if name in experts else 1) for name, n in seen.items())


@pytest.mark.parametrize("tokens", [[], list(range(65))])
def test_a_sequence_of_the_wrong_length_is_refused(path: Path, tokens: list[int]) -> None:
    with Engine.open(path, n_ctx=64, n_threads=2) as engine, pytest.raises(ValueError, match="takes 1 to"):
        engine.logits(tokens)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        Engine.open(tmp_path / "none.gguf", n_ctx=64, n_threads=1)


def test_an_unknown_architecture_is_reported_with_llama_cpps_reason(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(
        path.read_bytes().replace(b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00xxxxx", 1)
    )
    with pytest.raises(DynrunError, match="unknown model architecture"):
        Engine.open(other, n_ctx=64, n_threads=1)


def test_an_exception_in_a_hook_reaches_the_caller(path: Path) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("from the hook")

    with Engine.open(path, n_ctx=64, n_threads=2) as engine:
        with pytest.raises(RuntimeError, match="from the hook"):
            engine.watch_inputs([TOKENS], fail)
        assert np.isfinite(engine.logits(TOKENS)).all()
