"""MMLU-Pro, ARC, HellaSwag and Winogrande out of their files, asked as lm-evaluation-harness asks them.

Takes records in the Hub's form or in llm-foundry's (query, choices, gold), for HellaSwag also llama-perplexity's text;
gives a :class:`Task`. MMLU-Pro is answered with a letter at once, without the chain of thought of its own leaderboard
(as in the Open LLM Leaderboard). Asks nobody.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrun.artifacts import key_of
from dynrun.errors import UsageError
from dynrun.evaluation.mmlu import Entry, answer_index
from dynrun.evaluation.questions import LETTERS, Question, Score, Scoring, Task, question_id, with_unique_ids
from dynrun.evaluation.records import Record, data_files, errors_for_people, read_records


@dataclass(frozen=True)
class _Asked:
    """A record as it is asked: see :class:`Question`."""

    subject: str
    bodies: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int

    @property
    def shot(self) -> str:
        """The same with its answer, as an example."""
        body = self.bodies[self.gold] if len(self.bodies) > 1 else self.bodies[0]
        choice = self.choices[self.gold]
        return f"{body}{choice if choice.startswith(' ') else f' {choice}'}\n\n"


@dataclass(frozen=True)
class _Benchmark:
    """``split``: the Hub's part with answers that is asked, ``examples`` the one that shots are taken from."""

    scoring: Scoring
    score: Score
    asked: Callable[[Record], _Asked]
    split: str
    examples: str
    config: str = ""
    # Shots are of the question's own subject.
    by_subject: bool = False


def task(name: str, data: str, *, dev: str | None = None, shots: int = 0) -> Task:
    """Benchmark ``name`` from ``data``; ``shots`` examples before each question, the first ones of ``dev``.

    Raises UsageError for an unknown name, a record that is none of it, or too few examples; NotFoundError.
    """
    benchmark = _BENCHMARKS.get(name)
    if benchmark is None:
        raise UsageError(f"no task {name!r}", fix=f"there are: mmlu (dynrun eval mmlu), {', '.join(_BENCHMARKS)}")
    if shots and dev is None:
        raise UsageError(f"{shots} shots without examples", fix="give a file of examples with --dev")
    examples = list(_asked(benchmark, dev, benchmark.examples)) if dev is not None and shots else []
    questions = [
        Question(
            id=question_id(one.subject, one.bodies, one.choices, one.gold),
            subject=one.subject,
            header="",
            shots=_shots(benchmark, examples, one.subject, shots),
            bodies=one.bodies,
            choices=one.choices,
            gold=one.gold,
        )
        for one in _asked(benchmark, data, benchmark.split)
    ]
    settings = {"shots": shots, "examples": key_of({"shots": [one.shot for one in examples]})[:8]}
    return Task(name, benchmark.scoring, benchmark.score, settings, with_unique_ids(questions))


def _shots(benchmark: _Benchmark, examples: Sequence[_Asked], subject: str, n: int) -> tuple[str, ...]:
    own = [one for one in examples if one.subject == subject] if benchmark.by_subject else examples
    if len(own) < n:
        raise UsageError(f"{len(own)} examples of {subject}, {n} shots are asked for", fix="give fewer --shots")
    return tuple(one.shot for one in own[:n])


def _asked(benchmark: _Benchmark, data: str, split: str) -> Iterator[_Asked]:
    for path in data_files(data, default_config=benchmark.config, split=split):
        is_text = benchmark.asked is _hellaswag and path.suffix.lower() == ".txt"
        for record in _hellaswag_text(path) if is_text else read_records(path):
            yield benchmark.asked(record)


# -- each benchmark's records ------------------------------------------------------------------------------------------


def _mmlu_pro(record: Record) -> _Asked:
    question, options = _text(record, "question"), _texts(record, "options")
    answer = record.fields.get("answer_index")
    gold = answer_index(record, record.fields.get("answer") if answer is None else answer, len(options))
    subject = str(record.fields.get("category") or "mmlu-pro")
    body = Entry(question, options, gold).body("")
    return _Asked(subject, (body,), tuple(LETTERS[: len(options)]), gold)


def _arc(record: Record) -> _Asked:
    fields = record.fields
    if "query" in fields:
        return _of_query(record, "arc", "{}\nAnswer:")
    offered = fields.get("choices")
    if not isinstance(offered, dict):
        raise record.refuse("no choices with text and label")
    choices = _texts(Record(offered, record.place), "text")
    labels = [str(label) for label in offered.get("label", ())]
    # Some questions have 1–4 for A–D.
    if (key := str(fields.get("answerKey"))) not in labels:
        raise record.refuse(f"the answer {key!r} is none of the labels")
    body = f"Question: {_text(record, 'question')}\nAnswer:"
    return _Asked("arc", (body,), tuple(f" {choice}" for choice in choices), labels.index(key))


def _hellaswag(record: Record) -> _Asked:
    if "query" in record.fields:
        return _of_query(record, "hellaswag", "{}")
    context = f"{_text(record, 'ctx_a')} {str(record.fields.get('ctx_b') or '').capitalize()}"
    query = _cleaned(f"{_text(record, 'activity_label')}: {context}")
    endings = tuple(f" {_cleaned(ending)}" for ending in _texts(record, "endings"))
    return _Asked("hellaswag", (query,), endings, answer_index(record, record.fields.get("label"), len(endings)))


def _cleaned(text: str) -> str:
    """As the harness cleans it (lm_eval/tasks/hellaswag/utils.py): brackets are left over from WikiHow."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


_LINES = 6


def _hellaswag_text(path: Path) -> Iterator[Record]:
    """llama-perplexity's form: context, the right one's number, four endings, a line each."""
    with errors_for_people(path):
        # Only these ends count: other line separators are part of a text.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if len(lines) % _LINES:
        raise UsageError(f"{path} has {len(lines)} lines, not {_LINES} a task", fix="check that the file is whole")
    for i in range(0, len(lines), _LINES):
        query, gold, *choices = lines[i : i + _LINES]
        yield Record({"query": query, "gold": gold, "choices": choices}, f"{path}:{i + 1}")


def _winogrande(record: Record) -> _Asked:
    """Partial evaluation (Trinh and Le, arXiv 1806.02847): what follows the blank is scored after either option."""
    fields = record.fields
    if "context_options" in fields:
        bodies, rest = _texts(record, "context_options"), _text(record, "continuation")
        gold = answer_index(record, fields.get("gold"), len(bodies))
    else:
        before, blank, after = _text(record, "sentence").partition("_")
        if not blank or not after.strip():
            raise record.refuse("a sentence without a blank and what follows it")
        bodies, rest = (before + _text(record, "option1"), before + _text(record, "option2")), after.strip()
        if (answer := str(fields.get("answer"))) not in ("1", "2"):
            raise record.refuse(f"the answer {answer!r} is neither 1 nor 2")
        gold = int(answer) - 1
    return _Asked("winogrande", bodies, (f" {rest}",) * len(bodies), gold)


def _of_query(record: Record, subject: str, form: str) -> _Asked:
    """llm-foundry's form of a multiple choice."""
    choices = tuple(f" {choice.strip()}" for choice in _texts(record, "choices"))
    gold = answer_index(record, record.fields.get("gold"), len(choices))
    return _Asked(subject, (form.format(_text(record, "query").rstrip()),), choices, gold)


def _text(record: Record, key: str) -> str:
    value = record.fields.get(key)
    if not isinstance(value, str) or not value.strip():
        raise record.refuse(f"no text {key!r}")
    return value


def _texts(record: Record, key: str) -> tuple[str, ...]:
    value: Any = record.fields.get(key)
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(one, str) and one.strip() for one in value):
        raise record.refuse(f"no list of texts {key!r}")
    return tuple(value)


_BENCHMARKS: dict[str, _Benchmark] = {
    "mmlu-pro": _Benchmark("letters", "acc", _mmlu_pro, "test", "validation", by_subject=True),
    "arc": _Benchmark("continuations", "acc_norm", _arc, "test", "train", config="ARC-Challenge"),
    "hellaswag": _Benchmark("continuations", "acc_norm", _hellaswag, "validation", "train"),
    "winogrande": _Benchmark("continuations", "acc", _winogrande, "validation", "train", config="winogrande_xl"),
}
NAMES = tuple(_BENCHMARKS)
