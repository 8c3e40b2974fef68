"""Sampling options: what is sent, what is shown, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from dynrun.errors import UsageError
from dynrun.runtime.sampling import Sampling, described, in_force


def test_a_request_carries_only_what_was_given() -> None:
    assert Sampling().request() == {"max_tokens": -1}
    assert Sampling(temperature=0.0, top_k=20, seed=7, max_tokens=5).request() == {
        "temperature": 0.0,
        "top_k": 20,
        "seed": 7,
        "max_tokens": 5,
    }


def test_what_is_given_comes_before_the_model_and_the_model_before_llama_cpp() -> None:
    metadata = {"general.sampling.temp": 0.6000000238418579, "general.sampling.top_k": 20}
    found = {s.name: (s.value, s.origin) for s in in_force(Sampling(top_k=5), metadata)}
    assert found["temperature"] == (0.6, "model")
    assert found["top_k"] == (5, "you")
    assert found["min_p"] == (0.05, "llama.cpp")
    assert described(in_force(Sampling(top_k=5), metadata)) == "temperature 0.6 (model), top_k 5"
    assert described(in_force(Sampling(), {})) == "llama.cpp's defaults"


@pytest.mark.parametrize("value", ["hot", float("nan"), float("inf"), [1.0]])
def test_recommendations_that_are_no_numbers_are_ignored(value: Any) -> None:
    found = {s.name: s.origin for s in in_force(Sampling(), {"general.sampling.temp": value})}
    assert found["temperature"] == "llama.cpp"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": float("inf")}, "--temperature is inf"),
        ({"temperature": -1.0}, "--temperature is -1"),
        ({"top_p": 1.5}, "from 0 to 1"),
        ({"min_p": float("nan")}, "--min-p is nan"),
        ({"top_k": -3}, "--top-k is -3"),
    ],
)
def test_numbers_out_of_range_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(**given)
    assert words in str(caught.value)
