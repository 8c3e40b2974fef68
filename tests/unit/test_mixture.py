"""Sources mixed by weight."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrun.calibration.conversation import Conversation
from dynrun.calibration.dataset import Source, builtin
from dynrun.calibration.mixture import Ingredient, draw, open_ingredient, parse_mixture
from dynrun.calibration.splits import SPLITS, Split, split_of_source
from dynrun.errors import NotFoundError, UsageError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mydata.jsonl").write_text(json.dumps({"text": "Hello."}) + "\n")
    (tmp_path / "notes:3.txt").write_text("Notes.")
    return tmp_path


def test_a_mixture_has_names_and_weights() -> None:
    assert parse_mixture("builtin:2, self:3,mydata.jsonl:1,hf:owner/name:config:split:2,hf:owner/other:.5") == (
        Ingredient("builtin", 2),
        Ingredient("self", 3),
        Ingredient("mydata.jsonl", 1),
        Ingredient("hf:owner/name:config:split", 2),
        Ingredient("hf:owner/other", 0.5),
    )
    assert parse_mixture("builtin") == (Ingredient("builtin", 1),)
    assert parse_mixture("hf:owner/name:config") == (Ingredient("hf:owner/name:config", 1),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bultin:2", "did you mean builtin"),
        ("wiki", "there are builtin, self, files, and hf:owner/name"),
        ("builtin:0", "the weight of builtin is 0"),
        ("builtin:-1", "the weight of builtin is -1"),
        ("builtin,,self", "empty source"),
        ("", "empty source"),
        ("self,builtin,self:2", "self is named twice"),
        ("mydata.jsonl,./mydata.jsonl", "named twice"),
        ("hf:a/b,hf:a/b::train", "named twice"),
        ("hf:nonsense", "names no data set"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_mixture(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("my_data.jsonl", "did you mean mydata.jsonl"),
        ("elsewhere/mydata.jsonl:2", "elsewhere/mydata.jsonl does not exist"),
        ("other.txt", "other.txt does not exist"),
    ],
)
def test_a_file_that_is_not_there_is_not_found(text: str, message: str) -> None:
    with pytest.raises(NotFoundError, match=message):
        parse_mixture(text)


def test_ingredients_are_opened_by_name(folder: Path) -> None:
    assert open_ingredient("builtin") == builtin()
    mine = open_ingredient("mydata.jsonl")
    assert (mine.name, mine.conversations[0].text) == ("mydata.jsonl", "Hello.")
    assert open_ingredient(str(folder / "mydata.jsonl")).sha256 == mine.sha256
    with pytest.raises(UsageError, match="need a model"):
        open_ingredient("self")
    with pytest.raises(NotFoundError):
        open_ingredient("absent.txt")


def source(name: str, n: int) -> Source:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    return Source(name, "0", tuple(Conversation(f"{name}{i}", "chat", messages) for i in range(n)))


def size(conversation: Conversation) -> int:
    return 20 + hash_of(conversation.id) % 180


def hash_of(text: str) -> int:
    return sum((i + 7) * ord(c) for i, c in enumerate(text)) * 2654435761 >> 8


def test_every_beginning_has_the_proportions() -> None:
    sources = [(source("a", 3000), 2.0), (source("b", 3000), 3.0), (source("c", 3000), 1.0)]
    drawn = draw(sources, "calibration", n_tokens=100_000, count=size)
    got = Counter[str]()
    for conversation in drawn.conversations:
        got[conversation.id[0]] += size(conversation)
        total = sum(got.values())
        for name, share in (("a", 2 / 6), ("b", 3 / 6), ("c", 1 / 6)):
            assert abs(got[name] - share * total) <= 2 * 200
    assert drawn.tokens_of == got
    assert 100_000 <= sum(got.values()) < 100_200
    assert drawn.shortfalls == ()
    assert drawn == draw(sources, "calibration", n_tokens=100_000, count=size)


def test_a_shorter_draw_is_the_beginning_of_a_longer_one() -> None:
    sources = [(source("a", 300), 1.0), (source("b", 300), 1.0)]
    short, long = (draw(sources, "calibration", n_tokens=n, count=size).conversations for n in (2000, 9000))
    assert long[: len(short)] == short


def test_a_source_that_runs_out_hands_on_its_share() -> None:
    sources = [(source("few", 5), 2.0), (source("b", 900), 1.0), (source("c", 900), 1.0)]
    drawn = draw(sources, "calibration", n_tokens=10_000, count=lambda _: 100)
    assert drawn.tokens_of == {"few": 500, "b": 4800, "c": 4700}
    assert drawn.shortfalls == ("few has 500 of its 5,000 tokens; the other sources give the rest",)


def test_too_little_in_all_is_said() -> None:
    drawn = draw([(source("few", 5), 1.0)], "calibration", n_tokens=10_000, count=lambda _: 100)
    assert drawn.shortfalls == ("few has 500 of 10,000 tokens",)
    both = draw([(source("a", 5), 1.0), (source("b", 2), 1.0)], "calibration", n_tokens=900, count=lambda _: 100)
    assert both.tokens_of == {"a": 500, "b": 200}
    assert both.shortfalls[-1] == "all sources together have 700 of 900 tokens"


def test_each_conversation_is_counted_once_and_no_more_than_needed() -> None:
    asked = Counter[str]()

    def count(conversation: Conversation) -> int:
        asked[conversation.id] += 1
        return 0 if conversation.id.endswith("3") else 100

    drawn = draw([(source("a", 500), 1.0), (source("b", 500), 1.0)], "calibration", n_tokens=2000, count=count)
    assert set(asked.values()) == {1}
    assert len(asked) < 40
    assert {c.id for c in drawn.conversations} == {name for name in asked if not name.endswith("3")}


@pytest.mark.parametrize("which", SPLITS)
def test_only_the_split_asked_for_is_drawn(which: Split) -> None:
    sources = [(builtin(), 1.0), (source("a", 300), 1.0)]
    drawn = draw(sources, which, n_tokens=10**9, count=lambda _: 10)
    wanted = {c.id for one, _ in sources for c in split_of_source(one, which)}
    assert {c.id for c in drawn.conversations} == wanted
    assert (drawn.tokens_of["a"] == 0) == (which == "test")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.floats(0.1, 10)), min_size=1, max_size=4),
    st.integers(0, 5000),
)
def test_a_draw_ends_only_when_there_is_enough_or_nothing_left(sizes: list[tuple[int, float]], n_tokens: int) -> None:
    sources = [(source(name, n), weight) for name, (n, weight) in zip("abcd", sizes, strict=False)]
    drawn = draw(sources, "calibration", n_tokens=n_tokens, count=size)
    total = sum(drawn.tokens_of.values())
    there = [c for one, _ in sources for c in split_of_source(one, "calibration")]
    assert len({c.id for c in drawn.conversations}) == len(drawn.conversations)
    assert total == sum(map(size, drawn.conversations))
    assert total >= n_tokens or len(drawn.conversations) == len(there)
    if drawn.conversations:
        assert total - size(drawn.conversations[-1]) < n_tokens
