"""The reference's logits on disk: exact enough, whole or absent."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dynrun.artifacts import StageFolder, stage_folder
from dynrun.errors import DoesNotFitError, DynrunError
from dynrun.scoring.divergence import divergence
from dynrun.scoring.reference import Coded, ReferenceLogits, Scored, decode_logits, encode_logits, record_into

VOCAB = 2000
PARTS = tuple(Scored(f"part {i}", tuple(range(9)), tuple(range(8))) for i in range(3))


def _logits(n: int, n_vocab: int, seed: int = 0) -> np.ndarray:
    """Logits as language models give them: Zipf's law underneath, from flat to certain."""
    rng = np.random.default_rng(seed)
    rank = rng.permuted(np.broadcast_to(np.arange(1, n_vocab + 1), (n, n_vocab)), axis=1)
    rows = (2 * rng.standard_normal((n, n_vocab)) - np.log(rank)) * rng.uniform(0.8, 2.5, (n, 1))
    return rows.astype(np.float32)


def _exact(part: Scored) -> np.ndarray:
    return _logits(len(part.outputs), VOCAB, seed=int(part.id.split()[1]))


def _score(part: Scored) -> list[np.ndarray]:
    """In two blocks."""
    return np.split(_exact(part), [5])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageFolder:
    monkeypatch.setenv("DYNRUN_CACHE", str(tmp_path))
    return stage_folder("reference", {"of": "a test"})


@pytest.mark.parametrize("noise", [0.003, 0.1, 1.0])
def test_codes_move_the_mean_divergence_by_less_than_a_millionth(noise: float) -> None:
    reference = _logits(300, 16_000)
    model = reference + (noise * np.random.default_rng(1).standard_normal(reference.shape)).astype(np.float32)
    codes = encode_logits(reference)
    exact, decoded, coded = (
        divergence(logits, model).kld.mean() for logits in (reference, decode_logits(codes), Coded(codes))
    )
    assert abs(decoded - exact) < 1e-6
    assert abs(coded - exact) < 1e-6


def test_codes_keep_the_most_probable_token_even_where_two_are_almost_equal() -> None:
    reference = _logits(200, VOCAB)
    top = reference.argmax(axis=1)
    reference[np.arange(200), (top + 1) % VOCAB] = reference.max(axis=1) - np.float32(1e-5)
    assert (decode_logits(encode_logits(reference)).argmax(axis=1) == top).all()


def test_codes_clamp_the_tail_forty_nats_under_the_maximum() -> None:
    decoded = decode_logits(encode_logits(np.array([[3, -1, -90, -np.inf]], dtype=np.float32)))
    assert decoded[0] == pytest.approx([3, -1, -37, -37], abs=1e-3)


def test_codes_take_a_row_of_equal_logits() -> None:
    assert (decode_logits(encode_logits(np.full((1, 9), 2.5, dtype=np.float32))) == 2.5).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_codes_refuse_logits_that_are_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        encode_logits(np.array([[1, bad]], dtype=np.float32))


def test_recording_gives_each_parts_logits_back(folder: StageFolder) -> None:
    record_into(folder, PARTS, VOCAB, _score)
    recorded = ReferenceLogits(folder, PARTS, VOCAB)
    for i, part in enumerate(PARTS):
        exact = _exact(part)
        assert decode_logits(recorded.coded(i).codes) == pytest.approx(
            np.maximum(exact, exact.max(axis=1, keepdims=True) - 40), abs=1e-3
        )
    assert sum(path.stat().st_size for path in folder.path.glob("*.npy")) == pytest.approx(recorded.nbytes, rel=0.01)


def test_interrupted_recording_goes_on_where_it_stopped(folder: StageFolder) -> None:
    def interrupted(part: Scored) -> np.ndarray:
        if part.id == "part 1":
            raise KeyboardInterrupt
        return _score(part)

    with pytest.raises(KeyboardInterrupt):
        record_into(folder, PARTS, VOCAB, interrupted)
    scored = []
    record_into(folder, PARTS, VOCAB, lambda part: (scored.append(part.id), _score(part))[1])
    assert scored == ["part 1", "part 2"]
    assert sorted(path.name for path in folder.path.iterdir()) == ["00000.npy", "00001.npy", "00002.npy"]


def test_progress_counts_the_tokens_that_were_there_before(folder: StageFolder) -> None:
    record_into(folder, PARTS[:1], VOCAB, _score)
    seen: list[tuple[int, int]] = []
    record_into(folder, PARTS, VOCAB, _score, lambda done, total, _: seen.append((done, total)))
    assert seen == [(18, 27), (27, 27)]


def test_a_disk_too_small_is_said_before_anything_is_scored(
    folder: StageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DoesNotFitError, match="free"):
        record_into(folder, PARTS, VOCAB, lambda part: pytest.fail(f"scored {part.id}"))


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_damaged_recording_is_thrown_away_and_said(folder: StageFolder, keep: int) -> None:
    record_into(folder, PARTS, VOCAB, _score)
    damaged = folder / "00001.npy"
    damaged.write_bytes(damaged.read_bytes()[:keep])
    with pytest.raises(DynrunError, match="damaged"):
        ReferenceLogits(folder, PARTS, VOCAB).coded(1)
    assert not folder.path.exists()


def test_discard_frees_the_disk(folder: StageFolder) -> None:
    record_into(folder, PARTS, VOCAB, _score)
    ReferenceLogits(folder, PARTS, VOCAB).discard()
    assert not folder.path.exists()
