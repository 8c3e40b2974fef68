"""Questions with several answers, and a task made of them: plain data, the same for every benchmark.

Readers (mmlu.py, tasks.py) make them, choices.py has a model answer them. Reads no files and knows no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dynrun.artifacts import key_of
from dynrun.errors import UsageError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Scoring = Literal["letters", "continuations"]
# How an answer is chosen from the log-likelihoods of the choices (choices.py, Answer.choice).
Score = Literal["acc", "acc_norm", "acc_tokens"]


@dataclass(frozen=True)
class Question:
    """``header``, ``shots`` (answered examples), then a body, then one of ``choices``: together what a model reads.

    ``bodies``: one text before all choices, or one for each. ``gold``: the index of the right choice.
    """

    id: str
    subject: str
    header: str
    shots: tuple[str, ...]
    bodies: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int

    def prompt(self, choice: int = 0, dropped: int = 0) -> str:
        """What stands before ``choice``, without the first ``dropped`` shots."""
        body = self.bodies[choice] if len(self.bodies) > 1 else self.bodies[0]
        return "".join((self.header, *self.shots[dropped:], body))


@dataclass(frozen=True)
class Task:
    """A benchmark, ready to be answered. ``settings``: what else its numbers depend on; runs must agree in them.

    ``letters``: the choice whose letter is likeliest next; ``continuations``: the choice that is likeliest itself.
    """

    name: str
    scoring: Scoring
    score: Score
    settings: Mapping[str, Any]
    questions: tuple[Question, ...]

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return sum(1 / len(question.choices) for question in self.questions) / len(self.questions)

    @property
    def key(self) -> str:
        """Content address of everything that a model reads and how it is asked."""
        rows = [[q.id, q.subject, q.header, *q.shots, "", *q.bodies, *q.choices, q.gold] for q in self.questions]
        return key_of({"name": self.name, "scoring": self.scoring, "questions": rows})

    def limited(self, limit: int | None) -> Task:
        """The same with at most ``limit`` questions, as many of each subject as there can be."""
        return self if limit is None else replace(self, questions=tuple(spread(self.questions, limit)))


def question_id(*content: Any) -> str:
    """What names a question wherever it is asked: a hash of what is asked."""
    return key_of({"question": content})[:16]


def with_unique_ids(questions: Iterable[Question]) -> tuple[Question, ...]:
    """Number the copies of a question: benchmarks have a few."""
    seen: Counter[str] = Counter()
    found = []
    for question in questions:
        seen[question.id] += 1
        copy = seen[question.id]
        found.append(question if copy == 1 else replace(question, id=f"{question.id}-{copy}"))
    return tuple(found)


def spread(questions: Sequence[Question], limit: int) -> list[Question]:
    """``limit`` questions spread evenly over the subjects, and within each evenly over its questions, in order.

    Raises UsageError for a limit under 1.
    """
    if limit < 1:
        raise UsageError(f"a limit of {limit} questions", fix="ask for 1 or more")
    subjects: dict[str, list[Question]] = {}
    for question in questions:
        subjects.setdefault(question.subject, []).append(question)
    shares = _shares([len(some) for some in subjects.values()], limit)
    kept = {
        some[(2 * i + 1) * len(some) // (2 * share)].id
        for some, share in zip(subjects.values(), shares, strict=True)
        for i in range(share)
    }
    return [question for question in questions if question.id in kept]


def _shares(sizes: Sequence[int], limit: int) -> list[int]:
    """How many of each group: the same number but for one, unless a group has fewer; ``limit`` in all if there are."""
    shares = [0] * len(sizes)
    left = min(limit, sum(sizes))
    while left:
        open_groups = [i for i, size in enumerate(sizes) if shares[i] < size]
        each = max(1, left // len(open_groups))
        # A remainder goes to groups that lie evenly among the others, not to the first ones of the alphabet.
        chosen = open_groups if left >= len(open_groups) else _evenly(open_groups, left)
        for i in chosen:
            taken = min(each, sizes[i] - shares[i])
            shares[i] += taken
            left -= taken
    return shares


def _evenly(items: Sequence[int], n: int) -> list[int]:
    return [items[(2 * i + 1) * len(items) // (2 * n)] for i in range(n)]
