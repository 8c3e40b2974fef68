"""Log-probabilities with shared beginnings, against decoding every sequence alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dynrun.errors import DynrunError
from dynrun.gguf.header import read_header
from dynrun.llamacpp.branches import Branch, BranchEngine, cells
from dynrun.llamacpp.engine import Engine
from tests.tiny import write_tiny_llama
from tests.tiny_hybrid import write_tiny_hybrid

pytestmark = pytest.mark.native

N_BATCH = 24
# A stem longer than a batch, leaves of one token (nothing to decode) and of several, and a branch after them.
BRANCHES = [
    Branch((5, 6), ((7,), (8, 9, 10), (8, 11))),
    Branch(tuple(range(40, 70)), ((1, 2, 3, 4, 5), (9,))),
    Branch((30,), ((31,), (32,))),
    Branch((12, 13, 14), (tuple(range(100, 130)),)),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One whose cache can share cells between sequences, and one with states that cannot be shared."""
    folder = tmp_path_factory.mktemp("tiny")
    return {
        "attention": write_tiny_llama(folder / "attention.gguf"),
        "hybrid": write_tiny_hybrid(folder / "hybrid.gguf"),
    }


@pytest.fixture(scope="module")
def model(models: dict[str, Path]) -> Path:
    return models["attention"]


def alone(model: Path, prefix: list[int], branch: Branch, leaf: tuple[int, ...]) -> list[float]:
    """The leaf's log-probabilities when its whole sequence is decoded by itself."""
    start = len(prefix) + len(branch.stem)
    tokens = [*prefix, *branch.stem, *leaf]
    with Engine.open(model, n_ctx=256, n_threads=1) as engine:
        logits = engine.logits(tokens, range(start - 1, len(tokens) - 1)).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return [float(row[token]) for row, token in zip(log_p, leaf, strict=True)]


def test_what_a_model_would_say_itself_is_known(model: Path) -> None:
    with BranchEngine.open(model, n_ctx=256, n_batch=N_BATCH, n_seq_max=4, n_threads=1) as engine:
        said = [5, 6]
        for _ in range(3):
            said.append(int(engine.logits(said, [len(said) - 1])[0].argmax()))
        other = (said[2], (said[3] + 1) % 256, said[4])
        ((same, changed),) = engine.log_probabilities([5], [Branch((6,), (tuple(said[2:]), other))])
    assert same.is_top.tolist() == [True, True, True]
    assert changed.is_top.tolist()[:2] == [True, False]


@pytest.mark.parametrize("prefix", [[], [3], list(range(200, 260))], ids=["none", "one token", "longer than a batch"])
@pytest.mark.parametrize("n_seq_max", [4, 16])
@pytest.mark.parametrize("kind", ["attention", "hybrid"])
def test_shared_beginnings_change_no_log_probability(
    models: dict[str, Path], kind: str, prefix: list[int], n_seq_max: int
) -> None:
    model = models[kind]
    n_ctx = cells(len(prefix), BRANCHES, N_BATCH)
    with BranchEngine.open(model, n_ctx=n_ctx, n_batch=N_BATCH, n_seq_max=n_seq_max, n_threads=1) as engine:
        twice = [engine.log_probabilities(prefix, BRANCHES) for _ in range(2)]
    for found in twice:
        for branch, leaves in zip(BRANCHES, found, strict=True):
            for leaf, score in zip(branch.leaves, leaves, strict=True):
                # Batches of another shape round otherwise (0.012 at most here); another context is off by nats.
                assert score.log_p == pytest.approx(alone(model, prefix, branch, leaf), abs=0.03)


def test_a_branch_that_the_cache_has_no_room_for_is_refused(model: Path) -> None:
    with (
        BranchEngine.open(model, n_ctx=256, n_batch=N_BATCH, n_seq_max=4, n_threads=1) as engine,
        pytest.raises(ValueError, match="256 cells"),
    ):
        engine.log_probabilities(range(200), [Branch(tuple(range(100)), ((1,),))])


def test_logits_that_are_not_finite_are_traced_to_their_tensor(model: Path, tmp_path: Path) -> None:
    header, data = read_header(model), bytearray(model.read_bytes())
    tensor = header.tensors["blk.1.ffn_down.weight"]
    start = header.data_offset + tensor.offset
    data[start : start + tensor.nbytes] = np.full(tensor.n_elements, np.inf, dtype=np.float16).tobytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    with (
        BranchEngine.open(broken, n_ctx=256, n_batch=N_BATCH, n_seq_max=4, n_threads=1) as engine,
        pytest.raises(DynrunError, match=r"blk\.1\.ffn_down"),
    ):
        engine.log_probabilities([3], BRANCHES)
