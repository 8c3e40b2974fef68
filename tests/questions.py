"""Small multiple-choice data in the forms that benchmarks come in: sums, whose right answers are known."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path

N_CHOICES = 4
N_DEV = 5


def sums(n: int, seed: str) -> list[tuple[str, list[str], int]]:
    """``n`` questions: text, choices, the right one's index."""
    drawn, found = random.Random(seed), []  # noqa: S311
    for _ in range(n):
        a, b, gold = drawn.randrange(100), drawn.randrange(100), drawn.randrange(N_CHOICES)
        choices = [str(a + b + shift - gold) for shift in range(N_CHOICES)]
        found.append((f"What is {a} + {b}, in {seed}?", choices, gold))
    return found


def write_mmlu(
    folder: Path, subjects: Sequence[str] = ("small_sums", "large_sums"), *, n: int = 6, header: bool, letters: bool
) -> Path:
    """The original layout: `dev` with five examples and `test` with ``n`` questions of each subject."""
    for part, size in (("dev", N_DEV), ("test", n)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for subject in subjects:
            with (folder / part / f"{subject}_{part}.csv").open("w", encoding="utf-8", newline="") as stream:
                writer = csv.writer(stream)
                if header:
                    writer.writerow(["question", *(f"choice{i}" for i in range(N_CHOICES)), "answer"])
                for question, choices, gold in sums(size, f"{subject} {part}"):
                    writer.writerow([question, *choices, "ABCD"[gold] if letters else gold])
    return folder


def write_hellaswag(path: Path, n: int = 20) -> Path:
    """llama-perplexity's form: six lines a task."""
    lines = []
    drawn = random.Random(1)  # noqa: S311
    people, verbs = ("A man", "She", "The dog", "A girl in red"), ("walks to", "looks at", "jumps over", "paints")
    things = ("the wall", "a small car", "the table and sits down", "an old, wet hat", "nothing at all")
    for i in range(n):
        lines += [f"Task {i}: {drawn.choice(people)} {drawn.choice(verbs)} it. he", str(drawn.randrange(N_CHOICES))]
        lines += [f"{verb} {drawn.choice(things)}." for verb in drawn.sample(verbs, N_CHOICES)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
