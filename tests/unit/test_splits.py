"""The split in three: disjoint, by document, always the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dynrun.calibration.conversation import Conversation
from dynrun.calibration.dataset import Source, builtin
from dynrun.calibration.splits import SPLITS, Split, split, split_of_source


def said(name: str, document: str = "", kind: str = "chat") -> Conversation:
    messages = [{"role": "user", "content": name}, {"role": "assistant", "content": f"{name}, indeed"}]
    return Conversation(name, kind, messages, document=document)


def source(conversations: list[Conversation], name: str = "mine.jsonl") -> Source:
    return Source(name, "0", tuple(conversations), n_records=len(conversations))


MANY = source([said(f"c{i}", f"d{i // 4}") for i in range(2000)])


@pytest.mark.parametrize("one", [builtin(), MANY], ids=["builtin", "file"])
def test_the_splits_share_nothing_and_cover_everything(one: Source) -> None:
    parts = {which: {c.id for c in split_of_source(one, which)} for which in SPLITS}
    assert set().union(*parts.values()) == {c.id for c in one.conversations}
    assert sum(map(len, parts.values())) == len(one.conversations)


@pytest.mark.parametrize("one", [builtin(), MANY], ids=["builtin", "file"])
def test_no_document_is_in_two_splits(one: Source) -> None:
    parts = [{c.document or c.id for c in split_of_source(one, which)} for which in SPLITS]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


@pytest.mark.parametrize("which", SPLITS)
def test_every_split_of_the_shipped_set_has_every_kind(which: Split) -> None:
    kinds = {c.kind for c in builtin().conversations}
    chosen = split_of_source(builtin(), which)
    assert {c.kind for c in chosen} == kinds
    assert {c.kind for c in chosen[: len(kinds)]} == kinds


def test_documents_of_the_shipped_set_stay_together() -> None:
    conversations = [said(f"c{i}", f"d{i // 3}", kind="ab"[i % 2]) for i in range(120)]
    parts = [{c.document for c in split(conversations, which)} for which in SPLITS]
    assert sum(map(len, parts)) == 40
    assert len(set().union(*parts)) == 40


def test_a_users_source_has_a_tenth_to_probe_on_and_no_test() -> None:
    assert len(split_of_source(MANY, "probe")) == pytest.approx(200, abs=50)
    assert split_of_source(MANY, "test") == []


@pytest.mark.parametrize("one", [builtin(), MANY], ids=["builtin", "file"])
@pytest.mark.parametrize("which", SPLITS)
def test_the_split_does_not_depend_on_the_order(one: Source, which: Split) -> None:
    back = replace(one, conversations=one.conversations[::-1])
    assert {c.id for c in split_of_source(one, which)} == {c.id for c in split_of_source(back, which)}


def test_more_conversations_move_none_of_a_file() -> None:
    fewer = source(list(MANY.conversations[:1000]))
    there = {c.id for c in split_of_source(MANY, "probe")}
    assert {c.id for c in split_of_source(fewer, "probe")} == there & {c.id for c in fewer.conversations}


@pytest.mark.parametrize("n", [1, 2, 9])
def test_a_source_of_a_few_documents_is_all_for_calibration(n: int) -> None:
    for attempt in range(20):
        few = source([said(f"{attempt} {i}", f"{attempt} {i % n}") for i in range(3 * n)])
        assert len(split_of_source(few, "calibration")) == 3 * n


def test_near_duplicates_stay_out() -> None:
    marked = replace(MANY, near_duplicates=frozenset(["c1", "c2"]))
    ids = {c.id for which in SPLITS for c in split_of_source(marked, which)}
    assert ids == {c.id for c in MANY.conversations} - {"c1", "c2"}
