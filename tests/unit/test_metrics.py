"""Intervals and summaries of per-token measurements."""

from __future__ import annotations

import numpy as np
import pytest

from dynrun.metrics.intervals import (
    Clusters,
    clusters_of,
    mean_estimate,
    mean_interval,
    paired_difference,
    paired_ratio,
)
from dynrun.metrics.summary import perplexity, rms_delta_p, summarize


def _texts(rng: np.random.Generator, n: int, spread: float = 0.5) -> list[np.ndarray]:
    """Values in which each text has a level of its own; their expectation is 1."""
    return [1 + spread * rng.standard_normal() + 0.1 * rng.standard_normal(rng.integers(20, 200)) for _ in range(n)]


def test_mean_is_over_tokens_not_over_sequences() -> None:
    assert clusters_of([np.array([1.0]), np.array([2.0, 2.0, 2.0])]).mean == pytest.approx(7 / 4)


def test_interval_covers_the_truth_about_19_times_in_20() -> None:
    rng = np.random.default_rng(5)
    intervals = [mean_interval(clusters_of(_texts(rng, 40))) for _ in range(200)]
    assert 0.88 <= np.mean([low <= 1 <= high for low, high in intervals]) <= 0.99


def test_interval_by_sequence_is_wider_than_by_token_where_tokens_of_a_text_go_together() -> None:
    texts = _texts(np.random.default_rng(1), 30)
    low, high = mean_interval(clusters_of(texts))
    tokens = np.concatenate(texts)
    assert high - low > 4 * 2 * 1.96 * tokens.std() / np.sqrt(len(tokens))


def test_interval_is_the_same_each_time() -> None:
    clusters = clusters_of(_texts(np.random.default_rng(2), 12))
    assert mean_interval(clusters) == mean_interval(clusters)


def test_one_sequence_alone_still_gets_an_interval_around_its_mean() -> None:
    values = np.random.default_rng(3).standard_normal(500)
    low, high = mean_interval(clusters_of([values]))
    assert low < values.mean() < high


def test_one_value_alone_gets_an_interval_of_no_width() -> None:
    assert mean_interval(clusters_of([np.array([0.25])])) == (0.25, 0.25)


def test_nothing_to_summarize_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        clusters_of([np.empty(0)])


def test_paired_ratio_is_narrower_than_its_parts() -> None:
    texts = [np.abs(text) for text in _texts(np.random.default_rng(4), 30, spread=0.3)]
    noise = np.random.default_rng(6)
    harder = [text * 2 * (1 + 0.02 * noise.standard_normal()) for text in texts]
    ratio = paired_ratio(clusters_of(harder), clusters_of(texts))
    assert ratio is not None
    assert ratio.ci95[0] < ratio.value < ratio.ci95[1]
    assert ratio.value == pytest.approx(2, rel=0.02)
    low, high = mean_interval(clusters_of(texts))
    assert (ratio.ci95[1] - ratio.ci95[0]) / ratio.value < 0.2 * (high - low) / clusters_of(texts).mean


def test_paired_ratio_to_zero_is_none() -> None:
    assert paired_ratio(Clusters((1.0, 2.0), (5, 5)), Clusters((0.0, 0.0), (5, 5))) is None


def test_paired_ratio_refuses_different_sequences() -> None:
    with pytest.raises(ValueError, match="different sequences"):
        paired_ratio(Clusters((1.0,), (5,)), Clusters((1.0,), (6,)))


def test_percentiles_interpolate_as_llama_perplexity_does() -> None:
    summary = summarize([np.arange(11.0)[::-1]])
    assert (summary.mean, summary.median, summary.max) == (5, 5, 10)
    assert (summary.p90, summary.p99, summary.p999) == pytest.approx((9, 9.9, 9.99))


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices() -> None:
    assert perplexity(np.full(7, np.log(1 / 50))) == pytest.approx(50)


def test_rms_delta_p_is_of_probabilities() -> None:
    assert rms_delta_p(np.log([0.5, 0.2]), np.log([0.2, 0.6])) == pytest.approx(np.sqrt((0.09 + 0.16) / 2))


def test_an_estimate_is_the_mean_with_its_interval() -> None:
    texts = _texts(np.random.default_rng(4), 20)
    found, clusters = mean_estimate(texts), clusters_of(texts)
    assert (found.value, found.ci95) == (clusters.mean, mean_interval(clusters))
    assert found.to_json() == {"value": found.value, "ci95": list(found.ci95)}


def test_what_two_share_cancels_in_their_difference() -> None:
    rng = np.random.default_rng(6)
    texts = _texts(rng, 40)
    one, other = clusters_of([text + 0.1 for text in texts]), clusters_of(texts)
    found = paired_difference(one, other)
    assert found.value == pytest.approx(0.1)
    assert found.ci95 == pytest.approx((0.1, 0.1))
    noisy = paired_difference(one, clusters_of([text + rng.normal(0, 0.2) for text in texts]))
    assert noisy.ci95[0] < noisy.value < noisy.ci95[1]
    with pytest.raises(ValueError, match="different sequences"):
        paired_difference(one, clusters_of(texts[1:]))


def test_a_ratio_of_small_divergences_is_one_too() -> None:
    found = paired_ratio(Clusters((0.001, 0.002), (100, 100)), Clusters((0.002, 0.004), (100, 100)))
    assert found is not None
    assert found.value == pytest.approx(0.5)


def test_a_summary_has_the_interval_of_its_mean() -> None:
    groups = [np.array([0.1, 0.2]), np.array([0.3]), np.array([0.0, 0.4])]
    found = summarize(groups)
    assert found.ci95 == mean_interval(clusters_of(groups))
    assert found.ci95[0] < found.mean < found.ci95[1]
