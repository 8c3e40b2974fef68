"""The divergence of two sets of logits, against float64 by definition."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax

from dynrun.scoring.divergence import divergence

N, VOCAB = 100, 3000


def _logits(seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((N, VOCAB))).astype(np.float32)


def _by_definition(reference: np.ndarray, model: np.ndarray) -> np.ndarray:
    log_p, log_q = (log_softmax(logits.astype(np.float64), axis=1) for logits in (reference, model))
    value: np.ndarray = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return value


@pytest.mark.parametrize(("noise", "tolerance"), [(1e-3, 2e-3), (1e-2, 1e-4), (0.3, 1e-5), (3.0, 1e-5)])
def test_divergence_is_that_of_float64_however_small(noise: float, tolerance: float) -> None:
    reference = _logits()
    model = reference + noise * _logits(1, 1.0)
    assert divergence(reference, model).kld == pytest.approx(_by_definition(reference, model), rel=tolerance)


@pytest.mark.parametrize("offset", [0, 25])
def test_the_mean_is_exact_to_a_millionth_where_files_differ_much_and_logits_are_moved(offset: float) -> None:
    reference, model = _logits(), _logits() + 1.2 * _logits(1, 1.0)
    exact = _by_definition(reference, model).mean()
    assert exact > 0.3
    assert abs(divergence(reference, model + np.float32(offset)).kld.mean() - exact) < 1e-6


def test_divergence_from_itself_is_zero() -> None:
    found = divergence(_logits(), _logits())
    assert found.kld.max() == 0
    assert found.same_top.all()


def test_a_large_vocabulary_is_taken_in_tiles_with_the_same_result() -> None:
    reference, model = (np.tile(_logits(seed), (1, 12)) for seed in (0, 1))
    assert divergence(reference, model).kld == pytest.approx(_by_definition(reference, model), rel=2e-5)


def test_a_constant_added_to_a_row_changes_nothing() -> None:
    reference, model = _logits(), _logits(1)
    moved = (model + np.linspace(-9, 9, N)[:, None]).astype(np.float32)
    assert divergence(reference, moved).kld == pytest.approx(divergence(reference, model).kld, rel=1e-4)


def test_logits_hundreds_of_nats_apart_give_a_finite_divergence() -> None:
    reference, model = _logits(), _logits(1, 200.0)
    assert divergence(reference, model).kld == pytest.approx(_by_definition(reference, model), rel=1e-6)


def test_logits_that_are_not_finite_give_no_finite_divergence() -> None:
    model = _logits(1)
    model[3, 5] = np.nan
    finite = np.isfinite(divergence(_logits(), model).kld)
    assert not finite[3]
    assert finite.sum() == N - 1


def test_same_top_counts_rows_with_the_same_most_probable_token() -> None:
    model = _logits()
    model[::4, 7] = 99
    assert divergence(_logits(), model).same_top.sum() == N * 3 // 4


def test_probabilities_of_the_following_tokens_are_those_of_both_models() -> None:
    reference, model = _logits(), _logits(1, 60.0)
    following = np.random.default_rng(2).integers(0, VOCAB, N)
    found = divergence(reference, model, following)
    for log_p, logits in ((found.log_p_reference, reference), (found.log_p_model, model)):
        exact = log_softmax(logits.astype(np.float64), axis=1)[np.arange(N), following]
        assert log_p == pytest.approx(exact, rel=2e-6, abs=2e-5)


def test_without_following_tokens_their_probabilities_are_nan() -> None:
    assert np.isnan(divergence(_logits(), _logits(1)).log_p_model).all()


def test_no_rows_give_no_values() -> None:
    assert len(divergence(_logits()[:0], _logits()[:0]).kld) == 0


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes"):
        divergence(_logits(), _logits()[:, :-1])
