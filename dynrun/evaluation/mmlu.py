"""MMLU 5-shot, as its authors ask it (github.com/hendrycks/test, evaluate.py), from the original files or the Hub's.

Takes a folder with `dev` and `test` (CSV, with or without a header, answers as letters or 0–3; or Parquet as
`cais/mmlu` has it), gives a :class:`Task`. Asks nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrun.artifacts import key_of
from dynrun.calibration.hub import PREFIX
from dynrun.errors import NotFoundError, UsageError
from dynrun.evaluation.questions import LETTERS, Question, Task, question_id, with_unique_ids
from dynrun.evaluation.records import Record, data_files, read_records, read_table

N_SHOTS = 5
_N_CHOICES = 4
_PARTS = ("dev", "test")


@dataclass(frozen=True)
class Entry:
    """A question as the files have it; ``answer``: the index of the right one of ``choices``."""

    question: str
    choices: tuple[str, ...]
    answer: int

    def body(self, prefix: str) -> str:
        """What is asked; ``prefix`` begins the answer."""
        options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))
        return f"{self.question}{options}\nAnswer:{f' {prefix}' if prefix else ''}"

    def shot(self, prefix: str) -> str:
        """The same with its answer."""
        return f"{self.body(prefix)} {LETTERS[self.answer]}\n\n"


_Subjects = Mapping[str, Sequence[Entry]]


def mmlu(data: str, *, shots: int = N_SHOTS, answer_prefix: str = "") -> Task:
    """The task in ``data``, a folder or ``hf:cais/mmlu``.

    Raises NotFoundError or UsageError, naming the file and row.
    """
    dev, test = _read(data)
    missing = [subject for subject in test if len(dev.get(subject, ())) < shots]
    if missing:
        raise UsageError(
            f"{data} has {len(dev.get(missing[0], ()))} examples of {missing[0]}, {shots} are asked for",
            fix="give a whole data set, or fewer --shots",
        )
    questions = with_unique_ids(_questions(dev, test, shots, answer_prefix.strip()))
    examples = {subject: [one.shot("") for one in dev[subject][:shots]] for subject in sorted(test)} if shots else {}
    settings = {"shots": shots, "answer_prefix": answer_prefix.strip(), "examples": key_of(examples)[:8]}
    return Task("mmlu", "letters", "acc", settings, questions)


def _questions(dev: _Subjects, test: _Subjects, shots: int, prefix: str) -> Iterable[Question]:
    for subject, entries in sorted(test.items()):
        # Two spaces: format_subject begins with one (evaluate.py).
        header = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
        examples = tuple(one.shot(prefix) for one in dev.get(subject, ())[:shots])
        for one in entries:
            yield Question(
                id=question_id(subject, one.question, one.choices, one.answer),
                subject=subject,
                header=header,
                shots=examples,
                bodies=(one.body(prefix),),
                choices=tuple(LETTERS[: len(one.choices)]),
                gold=one.answer,
            )


def _read(data: str) -> tuple[_Subjects, _Subjects]:
    if data.startswith(PREFIX):
        # Both parts are wanted, whichever is named.
        place = ":".join(data.split(":")[:3])
        dev, test = (_of_records(data_files(place, default_config="all", split=part)) for part in _PARTS)
        return dev, test
    folder = data_files(data)[0]
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder", fix="give the folder that has dev and test in it")
    # The original archive has them in a folder `data`.
    root = folder / "data" if (folder / "data" / "test").is_dir() else folder
    if (root / "test").is_dir():
        dev, test = (_of_tables(root / part, part) for part in _PARTS)
    else:
        dev, test = (_of_records(sorted(root.rglob(f"{part}*.parquet"))) for part in _PARTS)
    if not test:
        raise NotFoundError(f"{folder} holds no MMLU", fix="it needs test/*_test.csv, or test*.parquet")
    return dev, test


def _of_tables(folder: Path, part: str) -> _Subjects:
    return {
        path.stem.removesuffix(f"_{part}"): _entries(path) for path in sorted(folder.glob("*.csv")) if path.is_file()
    }


def _entries(path: Path) -> list[Entry]:
    rows = read_table(path)
    if rows and rows[0][-1].strip().lower() == "answer":
        rows = rows[1:]
    return [_entry(path, i, row) for i, row in enumerate(rows, 1)]


def _entry(path: Path, i: int, row: Sequence[str]) -> Entry:
    record = Record({}, f"{path}, question {i}")
    if len(row) != _N_CHOICES + 2:
        raise record.refuse(f"{len(row)} fields, not a question, {_N_CHOICES} choices and an answer")
    return Entry(row[0], tuple(row[1:-1]), answer_index(record, row[-1], _N_CHOICES))


def _of_records(paths: Sequence[Path]) -> _Subjects:
    """Parquet as `cais/mmlu` has it: question, subject, choices, answer."""
    found: dict[str, list[Entry]] = {}
    for record in (record for path in paths for record in read_records(path)):
        fields = record.fields
        choices = fields.get("choices")
        if not isinstance(fields.get("question"), str) or not isinstance(choices, list) or len(choices) != _N_CHOICES:
            raise record.refuse(f"no question with {_N_CHOICES} choices")
        answer = answer_index(record, fields.get("answer"), _N_CHOICES)
        subject = str(fields.get("subject") or "mmlu")
        found.setdefault(subject, []).append(Entry(fields["question"], tuple(map(str, choices)), answer))
    return found


def answer_index(record: Record, answer: Any, n: int) -> int:
    """The index that ``answer`` means: a letter, or a number from 0. Raises UsageError."""
    text = str(answer).strip()
    index = LETTERS.find(text.upper()) if len(text) == 1 and text.isalpha() else int(text) if text.isdecimal() else -1
    if not 0 <= index < n:
        raise record.refuse(f"the answer {text!r} is none of the {n} choices")
    return index
