"""Accuracy, flips and efficiency, against scipy and published numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from dynrun.metrics.accuracy import Accuracy, wilson
from dynrun.metrics.efficiency import GIB, efficiency
from dynrun.metrics.flips import Flips, count_flips


@given(st.integers(1, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_intervals_are_scipys(counts: tuple[int, int]) -> None:
    successes, n = counts
    low, high = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-9)


def test_an_accuracy_says_its_share_and_interval() -> None:
    found = Accuracy(57, 228)
    assert found.value == 0.25
    assert found.ci95[0] < 0.25 < found.ci95[1]
    assert found.to_json() == {"accuracy": 0.25, "ci95": list(found.ci95), "correct": 57, "questions": 228}


def test_an_accuracy_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 of 0"):
        wilson(0, 0)


def test_flips_are_counted_by_their_direction() -> None:
    #                   kept right, right→wrong, wrong→right, wrong→other wrong, kept wrong
    found = count_flips([0, 1, 2, 3, 0], first=[0, 1, 0, 0, 1], second=[0, 2, 2, 1, 1])
    assert found == Flips(right_to_wrong=1, wrong_to_right=1, changed=3, questions=5)
    assert found.share == 0.4
    assert found.to_json() == {
        "flips": 0.4,
        "ci95": list(wilson(2, 5)),
        "right_to_wrong": 1,
        "wrong_to_right": 1,
        "changed": 3,
        "questions": 5,
        "p_value": 1.0,
    }


def test_flips_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no questions"):
        count_flips([], [], [])
    with pytest.raises(ValueError, match="shorter"):
        count_flips([0, 1], [0], [0, 1])


def test_the_same_answers_flip_nothing() -> None:
    found = count_flips([0, 1], [0, 0], [0, 0])
    assert (found.flips, found.changed, found.p_value) == (0, 0, 1.0)


@given(st.integers(0, 1200), st.integers(0, 1200))
def test_the_p_value_is_mcnemars_exact(worse: int, better: int) -> None:
    n = max(1, worse + better)
    # scipy gives 0 for what is smaller still.
    expected = binomtest(min(worse, better), worse + better, 0.5).pvalue if worse + better else 1.0
    assert Flips(worse, better, n, n).p_value == pytest.approx(expected, rel=1e-6, abs=1e-250)


def test_all_right_is_no_more_than_all_and_none_no_less_than_none() -> None:
    assert wilson(3, 3)[1] == 1.0
    assert wilson(0, 3)[0] == 0.0


def test_efficiency_is_told_in_both_units() -> None:
    found = efficiency(0.75, GIB)
    assert found.to_json() == {"per_gib": pytest.approx(50.0), "per_gb": pytest.approx(50.0 / 1.073741824)}
    assert efficiency(0.75, 1).per_gib == pytest.approx(50.0 * GIB)


def test_efficiency_is_unsloths_when_sizes_are_gib() -> None:
    """Gemma 3 27B Q8_0 as published: 71.60%, "26.74 GB", efficiency 1.74."""
    found = efficiency(0.7160, round(26.74 * GIB))
    assert round(found.per_gib, 2) == 1.74
    # The same file in decimal gigabytes is 28.71: read in the unit of its label the table contradicts itself.
    assert round(found.per_gb, 2) == 1.62


def test_a_file_without_bytes_has_no_efficiency() -> None:
    with pytest.raises(ValueError, match="0 bytes"):
        efficiency(0.5, 0)
