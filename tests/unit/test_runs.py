"""Stored runs: flips between run files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynrun.cli.app import main
from dynrun.errors import NotFoundError, UsageError
from dynrun.evaluation.choices import Answer
from dynrun.evaluation.runs import comparable, flips, read_run


def write_run(path: Path, picks: str, **changes: Any) -> Path:
    """A run whose i-th question (right: A) is answered with the i-th letter of ``picks``."""
    answers = [
        Answer(f"q{i}", "law", 0, [float(letter == pick) for letter in "ABCD"], [1] * 4, [0.0] * 4).to_json()
        for i, pick in enumerate(picks)
    ]
    run = {
        "task": "mmlu",
        "score": "acc",
        "settings": {"shots": 5, "n_ctx": 2048},
        "model": {"name": f"{path.stem}.gguf", "sha256": "0" * 64, "size_bytes": 2**30},
        "chance": 0.25,
        "elapsed_s": 2.0,
        "answers": answers,
    }
    path.write_text(json.dumps(run | changes), encoding="utf-8")
    return path


def test_flips_are_counted_over_the_questions_that_both_were_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = write_run(tmp_path / "a.json", "AABBC"), write_run(tmp_path / "b.json", "ABAD")
    assert main(["eval", "flips", str(first), str(second), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["right_to_wrong"], row["wrong_to_right"], row["changed"], row["questions"]) == (1, 1, 3, 4)
    assert row["flips"] == 0.5
    assert (row["first"]["model"], row["second"]["model"]) == ("a.gguf", "b.gguf")


def test_a_run_tells_its_accuracy_and_efficiency(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a.json", "AAAB"))
    assert run.accuracy().value == 0.75
    assert run.questions_per_second == 2.0
    assert run.efficiency is not None
    assert (run.efficiency.per_gib, round(run.efficiency.per_gb, 2)) == (50.0, 46.57)
    assert read_run(write_run(tmp_path / "h.json", "AB", task="hellaswag")).efficiency is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": "arc"}, r"b\.json of arc"),
        ({"settings": {"shots": 0, "n_ctx": 2048}}, "differ in shots: 5 and 0"),
        ({"answers": []}, "no question in common"),
    ],
)
def test_runs_that_are_not_alike_are_not_compared(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    first, second = write_run(tmp_path / "a.json", "AB"), write_run(tmp_path / "b.json", "AB", **changes)
    with pytest.raises(UsageError, match=reason):
        flips(read_run(first), read_run(second))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"task": "mmlu"}', '{"answers": [{"id": 1}]}'])
def test_what_is_no_run_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"x\.json is no run of `dynrun eval`"):
        read_run(path)
    with pytest.raises(NotFoundError, match="does not exist"):
        read_run(tmp_path / "none.json")


def test_of_many_runs_those_with_most_in_common_are_paired(tmp_path: Path) -> None:
    few, many, other = (
        read_run(path)
        for path in (
            write_run(tmp_path / "few.json", "A"),
            write_run(tmp_path / "many.json", "AAA"),
            write_run(tmp_path / "other.json", "AAAA", settings={"shots": 0}),
        )
    )
    assert comparable([few, many, other], [other, many]) == [(many, many), (other, other)]
    assert comparable([few, many], [other, read_run(write_run(tmp_path / "c.json", "A", task="arc"))]) == []


def test_the_score_decides_which_answer_is_given() -> None:
    one = Answer("q", "hellaswag", 1, log_p=[-9.0, -10.0], chars=[9, 20], tail=[-3.0, -2.0])
    assert (one.choice("acc"), one.choice("acc_norm"), one.choice("acc_tokens")) == (0, 1, 1)
