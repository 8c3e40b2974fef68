"""What native code would abort on, or read past the end of, is refused before it gets there."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.llamacpp import tools
from dynrun.llamacpp.engine import Engine, Piece
from dynrun.llamacpp.library import ggml
from dynrun.llamacpp.vocabulary import Vocabulary
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
TOKENS = [5, 70, 71, 200, 9, 33]
NAME = "blk.0.ffn_up.weight"
IDS = {name: kind.ggml_id for name, kind in TENSOR_TYPES.items()}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", n_block=1)


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[Engine]:
    with Engine.open(path, n_ctx=64, n_threads=1) as engine:
        yield engine


@pytest.mark.parametrize(
    "use",
    [
        lambda engine: engine.logits(TOKENS),
        lambda engine: list(engine.logit_blocks(TOKENS, [1], 4)),
        lambda engine: engine.extend([Piece(0, 0, TOKENS, (0,))]),
        lambda engine: engine.watch_inputs([TOKENS], print),
        lambda engine: engine.forget(),
        lambda engine: engine.read(NAME),
        lambda engine: engine.write(NAME, np.zeros(1)),
        lambda engine: engine.replaced(NAME, np.zeros(1)).__enter__(),
        lambda engine: engine.tokenize("x"),
        lambda engine: engine.piece(5),
        lambda engine: engine.bos,
        lambda engine: engine.eog_tokens,
    ],
)
def test_a_freed_engine_is_not_used(use: Callable[[Engine], object], path: Path) -> None:
    engine = Engine.open(path, n_ctx=64, n_threads=1)
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="is closed"):
        use(engine)


def test_mapped_weights_are_found_read_and_never_written(path: Path, engine: Engine) -> None:
    with Engine.open(path, n_ctx=64, n_threads=1, fixed=True) as mapped:
        logits = mapped.logits(TOKENS)
        assert np.array_equal(logits, engine.logits(TOKENS))
        # Their pages cannot be written: that would end the process.
        with pytest.raises(ValueError, match="was opened with weights that stay"):
            mapped.write(NAME, mapped.read(NAME))
        with (
            pytest.raises(ValueError, match="was opened with weights that stay"),
            mapped.replaced(NAME, mapped.read(NAME)),
        ):
            pass
        assert set(mapped.weights) == set(engine.weights)
        assert mapped.input_of == engine.input_of
        assert np.array_equal(mapped.read(NAME), engine.read(NAME))
        assert np.array_equal(mapped.logits(TOKENS), logits)


@pytest.mark.parametrize("outputs", [[6], [-1], [3, 3], [0, 99]])
def test_only_positions_that_there_are_have_logits(outputs: list[int], engine: Engine) -> None:
    with pytest.raises(ValueError, match="outputs"):
        engine.logits(TOKENS, outputs)
    with pytest.raises(ValueError, match="outputs"):
        list(engine.logit_blocks(TOKENS, outputs, 4))
    with pytest.raises(ValueError, match="outputs"):
        engine.extend([Piece(0, 0, TOKENS, tuple(outputs))])


@pytest.mark.parametrize("token", [-1, 320, 2**31, 2**40])
def test_only_tokens_that_there_are_are_decoded(token: int, engine: Engine) -> None:
    with pytest.raises(ValueError, match="token"):
        engine.logits([5, token])
    with pytest.raises(ValueError, match="token"):
        engine.piece(token)


@pytest.mark.parametrize("sequence", [-1, 1])
def test_only_sequences_that_there_are_go_on(sequence: int, engine: Engine) -> None:
    with pytest.raises(ValueError, match="sequences"):
        engine.extend([Piece(sequence, 0, TOKENS, (0,))])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_no_weight(value: float, engine: Engine) -> None:
    before = engine.read(NAME)
    values = before.view(np.float16).copy()
    values[7] = value
    with pytest.raises(ValueError, match="not finite"), engine.replaced(NAME, values):
        pass
    assert np.array_equal(engine.read(NAME), before)


def test_a_strided_array_is_written_as_what_it_shows(engine: Engine) -> None:
    before = engine.read(NAME).view(np.float16)
    wide = np.zeros((before.size, 2), dtype=np.float16)
    wide[:, 0] = before[::-1]
    with engine.replaced(NAME, wide[:, 0]):
        assert np.array_equal(engine.read(NAME).view(np.float16), before[::-1])


def test_bytes_of_a_quantized_weight_are_not_taken_for_numbers(path: Path, tmp_path: Path) -> None:
    tools.quantize(path, "q.gguf", "Q8_0", folder=tmp_path, n_threads=1)
    with Engine.open(tmp_path / "q.gguf", n_ctx=64, n_threads=1) as engine:
        stored = engine.read(NAME)
        with engine.replaced(NAME, np.full_like(stored, 0x7C)):
            assert (engine.read(NAME) == 0x7C).all()
        assert np.array_equal(engine.read(NAME), stored)


def test_pointers_are_no_bytes(engine: Engine) -> None:
    size = engine.read(NAME).size // 8
    with pytest.raises(ValueError, match="pointers"):
        engine.write(NAME, np.full(size, None, dtype=object))


@pytest.mark.parametrize(
    ("rows", "type_id", "imatrix", "reason"),
    [
        (np.zeros(256), IDS["Q4_K"], None, "dimensions"),
        (np.zeros((1, 2, 256)), IDS["Q4_K"], None, "dimensions"),
        (np.zeros((2, 255)), IDS["Q4_K"], None, "blocks have 256"),
        (np.zeros((2, 0)), IDS["Q4_0"], None, "blocks have 32"),
        (np.zeros((2, 256)), 99, None, "no tensor type"),
        (np.zeros((2, 256)), -1, None, "no tensor type"),
        (np.zeros((2, 256)), 4, None, "no tensor type"),
        (np.zeros((2, 256)), IDS["IQ2_XXS"], None, "needs an imatrix"),
        (np.zeros((2, 256)), IDS["IQ2_XXS"], np.ones(255), "imatrix of"),
        (np.zeros((2, 256)), IDS["Q4_K"], np.ones((1, 256)), "imatrix of"),
        (np.full((2, 256), np.nan), IDS["Q4_K"], None, "not finite"),
        (np.full((2, 256), np.inf), IDS["IQ4_NL"], None, "not finite"),
        (np.zeros((2, 256)), IDS["Q4_K"], np.full(256, np.nan), "not finite"),
    ],
)
def test_what_ggml_would_abort_on_is_not_quantized(
    rows: np.ndarray, type_id: int, imatrix: np.ndarray | None, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        ggml().quantize(type_id, rows, imatrix)


@pytest.mark.parametrize(
    ("n_bytes", "type_id", "reason"),
    [
        (143, IDS["Q4_K"], "143 bytes for 1 rows"),
        (288, IDS["Q4_K"], "288 bytes for 1 rows"),
        (1024, IDS["F32"], "not quantized"),
        (144, 255, "no tensor type"),
    ],
)
def test_bytes_that_are_no_rows_are_not_dequantized(n_bytes: int, type_id: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ggml().dequantize(type_id, np.zeros(n_bytes, dtype=np.uint8), 1, 256)


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K", "IQ4_XS"])
def test_strided_arrays_are_quantized_as_what_they_show(type_name: str) -> None:
    rows = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
    strided = rows[::2, ::2]
    data = ggml().quantize(IDS[type_name], strided, None)
    assert np.array_equal(data, ggml().quantize(IDS[type_name], strided.copy(), None))
    wide = np.stack([data, data], axis=1)[:, 0]
    values = ggml().dequantize(IDS[type_name], wide, 4, 256)
    assert np.array_equal(values, ggml().dequantize(IDS[type_name], data, 4, 256))
    assert np.abs(values - strided).max() < 0.5


def test_a_token_that_metadata_only_claim_has_no_text(path: Path, tmp_path: Path) -> None:
    key, other = b"tokenizer.ggml.unknown_token_id", tmp_path / "claims.gguf"
    data = path.read_bytes()
    at = data.index(key) + len(key) + 4
    other.write_bytes(data[:at] + struct.pack("<I", 4_000_000) + data[at + 4 :])
    with Vocabulary.load(other) as vocabulary:
        assert vocabulary.header.metadata[key.decode()] == 4_000_000
        assert vocabulary.token_text(key.decode()) == ""


def test_half_a_character_is_tokenized_as_a_question_mark(engine: Engine) -> None:
    assert engine.tokenize("a\ud800") == engine.tokenize("a?")
