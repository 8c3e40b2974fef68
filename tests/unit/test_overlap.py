"""Near-duplicates across splits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dynrun.calibration.conversation import Conversation
from dynrun.calibration.dataset import Source, builtin
from dynrun.calibration.overlap import calibration_pool, drop_near_duplicates
from dynrun.calibration.splits import SPLITS, Split, split_of_source

_VOCABULARY = np.array([f"w{i:x}" for i in range(5000)])
_CHARACTERS = np.array([chr(0x4E00 + i) for i in range(3000)])


def words(n: int, seed: int) -> list[str]:
    return list(np.random.default_rng(seed).choice(_VOCABULARY, n))


def said(name: str, answer: str, question: str = "", system: str = "") -> Conversation:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(name, "chat", messages)


def dropped(mine: str | Conversation, *held_out: str | Conversation) -> bool:
    one, *others = (part if isinstance(part, Conversation) else said("x", part) for part in (mine, *held_out))
    kept, ids = drop_near_duplicates([one], others)
    assert (kept, ids) in (([one], []), ([], [one.id]))
    return bool(ids)


def edited(text: list[str], every: int) -> str:
    return " ".join("changed" if i % every == every - 1 else word for i, word in enumerate(text))


def test_other_texts_are_kept_in_their_order() -> None:
    mine = [said(str(i), " ".join(words(200, i))) for i in range(30)]
    assert drop_near_duplicates(mine, [said("x", " ".join(words(5000, 99)))]) == (mine, [])
    assert drop_near_duplicates(mine, []) == (mine, [])
    assert drop_near_duplicates([], mine) == ([], [])


def test_a_copy_is_dropped_however_it_is_set() -> None:
    text = words(300, 1)
    assert dropped(" ".join(text), " ".join(text))
    assert dropped(", ".join(text).upper() + ".", "\n".join(text))
    assert dropped(Conversation("plain", "text", [], text=" ".join(text)), " ".join(text))


def test_an_edited_copy_is_dropped() -> None:
    text = words(300, 2)
    assert dropped(edited(text, 30), " ".join(text))
    assert not dropped(edited(text, 13), " ".join(text))


def test_a_third_in_common_is_too_much_and_a_quotation_is_not() -> None:
    theirs, own = words(300, 3), words(300, 4)
    assert dropped(" ".join(theirs[:120] + own[:180]), " ".join(theirs))
    assert not dropped(" ".join(theirs[:60] + own[:240]), " ".join(theirs))
    assert not dropped(" ".join(theirs[:20] + own[:240]), " ".join(theirs[:20]))


def test_a_short_text_within_a_long_one_is_dropped_both_ways() -> None:
    long = words(2000, 5)
    part = " ".join(long[500:600])
    assert dropped(part, " ".join(long))
    assert dropped(" ".join(long), part)


def test_short_texts_are_compared_too() -> None:
    assert dropped("What is the capital of Peru? Lima.", "what is the capital of peru lima")
    assert dropped("Name the highest mountain of Wales. It is Snowdon.", "Name the highest mountain of Wales. Snowdon.")
    assert not dropped("What is the capital of Peru? Lima.", "What is the capital of Chad? N'Djamena.")
    assert dropped("Yes.", "yes")
    assert not dropped("Yes.", "No.")
    assert not dropped("", "")


def test_scripts_without_spaces_are_compared_by_characters() -> None:
    rng = np.random.default_rng(6)
    theirs, own = ("".join(rng.choice(_CHARACTERS, 300)) for _ in range(2))
    assert dropped(theirs[:150] + own[:150], theirs)
    assert not dropped(own, theirs)
    assert dropped("สวัสดีครับ วันนี้อากาศดีมาก เราไปเดินเล่นกันไหม", "สวัสดีครับ วันนี้อากาศดีมาก เราไปเดินเล่นกันเถอะ")


def test_a_shared_system_prompt_is_no_overlap() -> None:
    system = " ".join(words(400, 7))
    mine = said("a", " ".join(words(100, 8)), system=system)
    assert not dropped(mine, said("b", " ".join(words(100, 9)), system=system))


def test_a_form_around_every_question_is_no_overlap_but_copies_in_it_are() -> None:
    form = " ".join(words(60, 10))
    mine = [said(f"a{i}", " ".join(words(60, 100 + i)), question=form) for i in range(100)]
    held = [said(f"b{i}", " ".join(words(60, 300 + i)), question=form) for i in range(20)]
    assert drop_near_duplicates(mine, held) == (mine, [])
    copy, near = replace(held[3], id="copy"), said("near", edited(words(60, 304), 40), question=form)
    assert drop_near_duplicates([*mine, copy, near], held) == (mine, ["copy", "near"])


def test_thoughts_count_as_said() -> None:
    thought = " ".join(words(200, 11))
    messages = [{"role": "assistant", "content": "Yes.", "reasoning_content": thought}]
    assert dropped(Conversation("a", "chat", messages), thought)


def test_agrees_with_sets_of_n_grams() -> None:
    """The index against the definition, on texts that share passages of every length."""
    rng = np.random.default_rng(12)
    common = words(400, 13)
    texts = []
    for i in range(60):
        a, n = rng.integers(0, 300), rng.integers(0, 100)
        texts.append([*words(100, 1000 + i), *common[a : a + n], *words(60, 2000 + i)])
    mine, held = texts[:40], texts[40:]
    grams = [{tuple(text[i : i + 13]) for i in range(len(text) - 12)} for text in texts]
    expected = [
        str(i)
        for i in range(40)
        if any(len(grams[i] & grams[j]) >= 0.3 * min(len(grams[i]), len(grams[j])) for j in range(40, 60))
    ]
    ours = [said(str(i), " ".join(text)) for i, text in enumerate(mine)]
    assert drop_near_duplicates(ours, [said("x", " ".join(text)) for text in held])[1] == expected
    assert 0 < len(expected) < 40


def file_of(conversations: list[Conversation], name: str) -> Source:
    renamed = tuple(replace(c, id=f"{name} {i}", document="") for i, c in enumerate(conversations))
    return Source(name, "0", renamed)


def test_a_pool_has_no_text_of_the_shipped_test_and_probe_parts() -> None:
    shipped = builtin()
    copied = [c for which in ("probe", "test") for c in split_of_source(shipped, which)]
    own = [said(str(i), " ".join(words(300, 5000 + i))) for i in range(100)]
    (pool,) = calibration_pool([file_of([*copied, *own], "a")])
    left = {c.messages[-1]["content"] for c in split_of_source(pool, "calibration")}
    assert not left & {c.messages[-1]["content"] for c in copied}
    assert len(left) > 80
    probed = {c.messages[-1]["content"] for c in split_of_source(pool, "probe")}
    assert not probed & {c.messages[-1]["content"] for c in split_of_source(shipped, "test")}


def test_a_pool_has_no_text_of_another_sources_probe_part() -> None:
    texts = [said(str(i), " ".join(words(300, 7000 + i))) for i in range(200)]
    sources = [file_of(texts, "a"), file_of(texts, "b"), builtin()]
    pool = calibration_pool(sources)
    assert [one.name for one in pool] == ["a", "b", "builtin"]
    probed = {c.messages[-1]["content"] for one in pool for c in split_of_source(one, "probe")}
    calibrated = {c.messages[-1]["content"] for one in pool for c in split_of_source(one, "calibration")}
    assert probed
    assert not probed & calibrated
    assert pool[2] == sources[2]


def test_the_shipped_set_has_no_near_duplicates_across_its_splits() -> None:
    assert calibration_pool([builtin()])[0].near_duplicates == frozenset()


@pytest.mark.parametrize("which", SPLITS)
def test_the_shipped_parts_are_not_changed_by_a_copy_in_a_users_file(which: Split) -> None:
    shipped = builtin()
    pool = calibration_pool([shipped, file_of(list(shipped.conversations), "copy")])
    before = [c.id for c in split_of_source(shipped, which)]
    after = [c.id for c in split_of_source(pool[0], which)]
    kept = set(before) if which != "calibration" else set(after)
    assert after == [name for name in before if name in kept]
