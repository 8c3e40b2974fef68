"""Tasks out of files: prompts to the letter, limits spread evenly, errors that name the row."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynrun.errors import DynrunError, NotFoundError, UsageError
from dynrun.evaluation.mmlu import mmlu
from dynrun.evaluation.questions import Question, question_id, spread, with_unique_ids
from dynrun.evaluation.tasks import NAMES, task
from tests.hub_server import serving_here
from tests.questions import sums, write_hellaswag, write_mmlu


def write_jsonl(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


# -- MMLU --------------------------------------------------------------------------------------------------------------

PROMPT = """\
The following are multiple choice questions (with answers) about  bird law.

May birds vote?
A. yes
B. no
C. only owls
D. on Sundays
Answer:{prefix} B

Is a "finch, small" a bird?
A. 1
B. 2
C. None
D.{space}
Answer:{prefix}"""


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    for part, row in (
        ("dev", "May birds vote?,yes,no,only owls,on Sundays,B\n"),
        ("test", '"Is a ""finch, small"" a bird?",1,2,None,,D\n'),
    ):
        (tmp_path / "data" / part).mkdir(parents=True)
        (tmp_path / "data" / part / f"bird_law_{part}.csv").write_text(row, encoding="utf-8")
    return tmp_path


def test_the_prompt_is_that_of_the_benchmarks_authors(birds: Path) -> None:
    """evaluate.py of hendrycks/test, two spaces before the subject included; but texts like None stay as they are."""
    (question,) = mmlu(str(birds), shots=1).questions
    assert question.prompt() == PROMPT.format(space=" ", prefix="")
    assert (question.choices, question.gold) == (("A", "B", "C", "D"), 3)


def test_an_answer_prefix_is_in_question_and_examples(birds: Path) -> None:
    (question,) = mmlu(str(birds), shots=1, answer_prefix="The best answer is").questions
    assert question.prompt() == PROMPT.format(space=" ", prefix=" The best answer is")


def test_shots_are_dropped_from_the_front(tmp_path: Path) -> None:
    question = mmlu(str(write_mmlu(tmp_path, header=False, letters=True))).questions[0]
    assert len(question.shots) == 5
    assert question.prompt(0, 3) == question.header + question.shots[3] + question.shots[4] + question.bodies[0]
    assert question.prompt(0, 5) == question.header + question.bodies[0]


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("letters", [False, True])
def test_all_forms_of_the_files_are_one_task(tmp_path: Path, header: bool, letters: bool) -> None:
    found = mmlu(str(write_mmlu(tmp_path / "one", header=header, letters=letters)))
    original = mmlu(str(write_mmlu(tmp_path / "original", header=False, letters=True)))
    assert found == original
    assert found.key == original.key
    assert [(q.bodies[0].split("\n")[0], q.gold) for q in found.questions[:6]] == [
        (text, gold) for text, _, gold in sums(6, "large_sums test")
    ]


def write_parquet(path: Path, part: str, n: int) -> Path:
    """A part of the two subjects, as `cais/mmlu` has it."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"question": text, "subject": subject, "choices": choices, "answer": gold}
        for subject in ("small_sums", "large_sums")
        for text, choices, gold in sums(n, f"{subject} {part}")
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_parquet_as_the_hub_has_it_is_the_same_task(tmp_path: Path) -> None:
    for part, n in (("dev", 5), ("test", 6)):
        write_parquet(tmp_path / "all" / f"{part}-00000-of-00001.parquet", part, n)
    assert mmlu(str(tmp_path)) == mmlu(str(write_mmlu(tmp_path / "csv", header=False, letters=True)))


CARD = """---
configs:
- config_name: one_subject
  data_files: one_subject/*.parquet
- config_name: all
  data_files:
  - split: test
    path: all/test-*.parquet
  - split: dev
    path: all/dev-*.parquet
---
"""


def test_data_of_the_hub_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {
        f"all/{part}-0.parquet": write_parquet(tmp_path / f"{part}.parquet", part, n).read_bytes()
        for part, n in (("dev", 5), ("test", 6), ("validation", 1))
    }
    ending = {"ctx_a": "He", "ctx_b": "", "activity_label": "Go", "endings": ["runs", "walks"], "label": "1"}
    with serving_here(monkeypatch, tmp_path) as hub:
        hub.repositories["cais/mmlu"] = {"README.md": CARD.encode(), **parts}
        hub.repositories["o/h"] = {
            f"data/{part}.jsonl": json.dumps(ending).encode() for part in ("train", "validation")
        }
        expected = mmlu(str(write_mmlu(tmp_path / "csv", header=False, letters=True)))
        assert mmlu("hf:cais/mmlu") == mmlu("hf:cais/mmlu:all:test") == expected
        assert len(task("hellaswag", "hf:o/h").questions) == 1
        assert any(request.endswith("data/validation.jsonl") for request in hub.requests)
        assert not any(request.endswith("data/train.jsonl") for request in hub.requests)
        with pytest.raises(NotFoundError, match="no split 'test'"):
            task("arc", "hf:o/h:default:test")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("q,1,2,3,4", "question 2: 5 fields"),
        ("q,1,2,3,4,E", "question 2: the answer 'E' is none of the 4 choices"),
        ("q,1,2,3,4,7", "question 2: the answer '7' is none"),
        ('q,1,2,3,"4,A', "cannot be read: unexpected end of data"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: str, reason: str) -> None:
    write_mmlu(tmp_path, header=False, letters=True, n=1)
    path = tmp_path / "test" / "small_sums_test.csv"
    path.write_text(path.read_text(encoding="utf-8") + row + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"small_sums_test\.csv") as error:
        mmlu(str(tmp_path))
    assert reason in error.value.message


def test_missing_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        mmlu(str(tmp_path / "nothing"))
    with pytest.raises(NotFoundError, match="holds no MMLU"):
        mmlu(str(tmp_path))
    write_mmlu(tmp_path, header=False, letters=True)
    (tmp_path / "dev" / "small_sums_dev.csv").unlink()
    with pytest.raises(UsageError, match="0 examples of small_sums, 5 are asked for"):
        mmlu(str(tmp_path))
    assert len(mmlu(str(tmp_path), shots=0).questions) == 12


# -- limits ------------------------------------------------------------------------------------------------------------


def question(subject: str, i: int) -> Question:
    return Question(f"{subject}-{i}", subject, "", (), ("q",), ("A", "B"), 0)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 400))
def test_a_limit_is_spread_evenly(sizes: list[int], limit: int) -> None:
    questions = [question(str(s), i) for s, size in enumerate(sizes) for i in range(size)]
    kept = spread(questions, limit)
    assert len(kept) == min(limit, len(questions))
    assert kept == [one for one in questions if one in kept]
    shares = Counter(one.subject for one in kept)
    full = {str(s) for s, size in enumerate(sizes) if shares[str(s)] == size}
    others = [shares[str(s)] for s in range(len(sizes)) if str(s) not in full]
    # Whoever has questions left has as many as any, but for the rest of the division.
    assert not others or min(others) >= max(shares.values()) - 1


def test_questions_of_a_subject_are_drawn_from_all_of_it() -> None:
    kept = spread([question("a", i) for i in range(100)], 4)
    assert [one.id for one in kept] == ["a-12", "a-37", "a-62", "a-87"]


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="limit of 0"):
        spread([question("a", 0)], 0)


def test_copies_of_a_question_have_ids_of_their_own() -> None:
    same = question_id("what", ("a", "b"))
    assert same == question_id("what", ("a", "b")) != question_id("what", ("b", "a"))
    ids = [one.id for one in with_unique_ids([question("a", 1)] * 3)]
    assert ids == ["a-1", "a-1-2", "a-1-3"]


# -- other tasks -------------------------------------------------------------------------------------------------------


def test_hellaswag_is_cleaned_as_the_harness_cleans_it(tmp_path: Path) -> None:
    record = {
        "activity_label": "Baking",
        "ctx_a": "A cook stirs [substeps] a bowl.",
        "ctx_b": "then he",
        "endings": ["eats [title] Done", " sings.", "leaves  now.", "sits."],
        "label": "2",
    }
    found = task("hellaswag", write_jsonl(tmp_path / "h.jsonl", record))
    assert (found.scoring, found.score, found.chance) == ("continuations", "acc_norm", 0.25)
    (one,) = found.questions
    assert one.prompt() == "Baking: A cook stirs a bowl. Then he"
    assert one.choices == (" eats. Done", " sings.", " leaves now.", " sits.")
    assert one.gold == 2


def test_hellaswag_as_llama_perplexity_has_it(tmp_path: Path) -> None:
    found = task("hellaswag", str(write_hellaswag(tmp_path / "h.txt", 3)))
    assert len(found.questions) == 3
    assert found.questions[0].prompt().startswith("Task 0: ")
    assert found.questions[0].choices[0].startswith(" ")
    path = tmp_path / "torn.txt"
    path.write_text("context\n0\na\nb\n", encoding="utf-8")
    with pytest.raises(UsageError, match="4 lines, not 6 a task"):
        task("hellaswag", str(path))


def test_arc_in_both_forms(tmp_path: Path) -> None:
    hub = {
        "question": "Which is a star?",
        "choices": {"text": ["Sun", "Moon", "Mars"], "label": ["1", "2", "3"]},
        "answerKey": "1",
    }
    foundry = {"query": "Question: Which is a star?", "choices": ["Sun", "Moon", "Mars"], "gold": 0}
    one, other = (task("arc", write_jsonl(tmp_path / f"{i}.jsonl", record)) for i, record in enumerate((hub, foundry)))
    assert one.questions == other.questions
    assert one.questions[0].prompt() == "Question: Which is a star?\nAnswer:"
    assert one.questions[0].choices == (" Sun", " Moon", " Mars")


def test_winogrande_scores_what_follows_the_blank(tmp_path: Path) -> None:
    hub = {"sentence": "Ann met Eve, so _ was glad.", "option1": "Ann", "option2": "Eve", "answer": "2"}
    foundry = {
        "context_options": ["Ann met Eve, so Ann", "Ann met Eve, so Eve"],
        "continuation": "was glad.",
        "gold": 1,
    }
    one, other = (
        task("winogrande", write_jsonl(tmp_path / f"{i}.jsonl", record)) for i, record in enumerate((hub, foundry))
    )
    assert one.questions == other.questions
    (question,) = one.questions
    assert [question.prompt(i) + question.choices[i] for i in range(2)] == [
        "Ann met Eve, so Ann was glad.",
        "Ann met Eve, so Eve was glad.",
    ]


def test_mmlu_pro_has_up_to_ten_letters_and_shots_of_its_category(tmp_path: Path) -> None:
    options = [str(i) for i in range(10)]
    dev = [
        {"question": f"{category} {i}", "options": options, "answer": "J", "answer_index": 9, "category": category}
        for category in ("law", "math")
        for i in range(2)
    ]
    asked = {"question": "What?", "options": options[:9], "answer": "C", "answer_index": 2, "category": "math"}
    paths = write_jsonl(tmp_path / "test.jsonl", asked), write_jsonl(tmp_path / "dev.jsonl", *dev)
    found = task("mmlu-pro", paths[0], dev=paths[1], shots=2)
    (one,) = found.questions
    assert (one.choices, one.gold, one.subject) == (tuple("ABCDEFGHI"), 2, "math")
    assert one.prompt().startswith("math 0\nA. 0\nB. 1\n")
    assert one.prompt().count("Answer: J\n\n") == 2
    assert one.prompt().endswith("\nI. 8\nAnswer:")
    assert found.key != task("mmlu-pro", paths[0]).key


@pytest.mark.parametrize("name", NAMES)
def test_a_record_of_another_benchmark_is_refused_by_its_line(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", {"messages": []})
    with pytest.raises(UsageError, match=r"x\.jsonl:1: no ") as error:
        task(name, path)
    assert "correct the file" in error.value.fix


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "holds no records"),
        ("{", "cannot be read"),
        ("[1]", "no record"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "the answer '2' is none of the 2 choices"),
        ('{"query": "q", "choices": ["a"], "gold": 0}', "no list of texts 'choices'"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_a_file_that_is_no_task_is_told_in_a_line(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DynrunError) as error:
        task("arc", str(path))
    assert reason in error.value.message
    assert "\n" not in str(error.value)


def test_unknown_names_and_shots_without_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no task 'arc-easy'"):
        task("arc-easy", "x")
    path = write_jsonl(tmp_path / "x.jsonl", {"query": "q", "choices": ["a", "b"], "gold": 0})
    with pytest.raises(UsageError, match="3 shots without examples"):
        task("arc", path, shots=3)
    with pytest.raises(UsageError, match="1 examples of arc, 3 shots"):
        task("arc", path, dev=path, shots=3)
    with pytest.raises(UsageError, match="no file of records"):
        task("arc", str(Path(__file__)))
