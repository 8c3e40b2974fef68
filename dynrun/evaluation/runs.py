"""Runs: the stored answers of a model to a task, and what is read out of them.

A run lies in the cache under the hashes of model and task, so that it is found and not repeated; an interrupted one
goes on with the block it was at. `run.json` in its folder is the whole of it: accuracies, and flips between any two
runs, come from such files alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrun.artifacts import (
    MANIFEST,
    StageFolder,
    append_line,
    read_lines,
    run_stage,
    sha256_file,
    stage_folder,
    write_json,
)
from dynrun.errors import MALFORMED, NotFoundError, UsageError
from dynrun.evaluation.choices import Answer, Block, answer, open_engine, prepare
from dynrun.evaluation.questions import Score, Task
from dynrun.gguf.header import Header, read_header
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.vocabulary import Vocabulary
from dynrun.metrics.accuracy import Accuracy
from dynrun.metrics.efficiency import Efficiency, efficiency
from dynrun.metrics.flips import Flips, count_flips
from dynrun.paths import stages_dir

DEFAULT_N_CTX = 4096
RUN = "run.json"
_STAGE = "answers"
_PARTIAL = "answers.jsonl"
# Counts up when answers come out otherwise.
_FORMAT = 1

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Run:
    """``model``: the file's name; ``settings``: what compared runs must agree in; ``elapsed_s``: computing only."""

    task: str
    score: Score
    settings: Mapping[str, Any]
    model: str
    sha256: str
    size_bytes: int
    chance: float
    elapsed_s: float
    answers: tuple[Answer, ...]
    path: Path
    cached: bool = False

    def accuracy(self, score: Score | None = None) -> Accuracy:
        """Of all questions, by the task's own score or another."""
        return _accuracy(self.answers, score or self.score)

    @property
    def subjects(self) -> dict[str, Accuracy]:
        """Accuracy of each subject, in the task's order."""
        found: dict[str, list[Answer]] = {}
        for one in self.answers:
            found.setdefault(one.subject, []).append(one)
        return {subject: _accuracy(some, self.score) for subject, some in found.items()}

    @property
    def shortened(self) -> int:
        """Questions that were asked with fewer shots than wanted, or cut, for the context's sake."""
        return sum(bool(one.dropped or one.cut) for one in self.answers)

    @property
    def questions_per_second(self) -> float:
        return len(self.answers) / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def efficiency(self) -> Efficiency | None:
        """Of MMLU, which it is defined for; None for other tasks."""
        return efficiency(self.accuracy().value, self.size_bytes) if self.task == "mmlu" else None

    def to_json(self) -> dict[str, Any]:
        """As `dynrun eval mmlu` and `eval task` print it: without the answers, which lie at ``run``."""
        gained = self.efficiency
        return {
            "task": self.task,
            "model": self.model,
            "sha256": self.sha256,
            "size_bytes": self.size_bytes,
            **self.accuracy().to_json(),
            "score": self.score,
            "chance": self.chance,
            "scores": {score: self.accuracy(score).value for score in _scores(self.task)},
            "subjects": {subject: found.to_json() for subject, found in self.subjects.items()},
            "efficiency": gained and gained.to_json(),
            "settings": dict(self.settings),
            "shortened": self.shortened,
            "questions_per_second": self.questions_per_second,
            "cached": self.cached,
            "run": str(self.path),
        }


def run_task(
    model: Path,
    task: Task,
    *,
    n_ctx: int = DEFAULT_N_CTX,
    n_threads: int,
    n_gpu_layers: int = -1,
    shared: bool = True,
    progress: Progress = lambda *_: None,
) -> Run:
    """The answers of ``model`` to ``task``, found or made. ``n_ctx`` is capped to what the model was trained for.

    Raises UsageError for a task without questions, DynrunError for a model that cannot be asked.
    """
    if not task.questions:
        raise UsageError(f"{task.name} has no questions", fix="check --data")
    header = read_header(model)
    trained = header.metadata.get(f"{header.architecture}.context_length")
    n_ctx = min(n_ctx, trained) if isinstance(trained, int) and trained > 0 else n_ctx
    inputs = {
        "format": _FORMAT,
        "model": sha256_file(model),
        "task": task.key,
        "settings": {**task.settings, "n_ctx": n_ctx},
        "shared": shared,
        "llama_cpp": installation().commit,
        "backend": installation().backend,
    }

    def work(folder: StageFolder) -> Mapping[str, Any]:
        with Vocabulary.load(model) as vocabulary:
            blocks = prepare(task, vocabulary, n_ctx=n_ctx, shared=shared)
        rows = _answered(folder, blocks, model, n_threads, n_gpu_layers, progress)
        write_json(folder / RUN, _run_json(task, inputs, header, rows))
        (folder / _PARTIAL).unlink()
        return {"questions": len(task.questions), "task": task.name}

    folder = stage_folder(_STAGE, inputs)
    outcome = run_stage(folder, work)
    return read_run(folder / RUN, cached=outcome.cached)


def _run_json(
    task: Task, inputs: Mapping[str, Any], header: Header, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What :func:`read_run` reads."""
    return {
        "task": task.name,
        "score": task.score,
        "settings": inputs["settings"],
        "model": {"name": header.path.name, "sha256": inputs["model"], "size_bytes": header.file_bytes},
        "chance": task.chance,
        "elapsed_s": round(sum(row["elapsed_s"] for row in rows), 3),
        "answers": [one for row in rows for one in row["answers"]],
    }


def _answered(
    folder: StageFolder, blocks: list[Block], model: Path, n_threads: int, n_gpu_layers: int, progress: Progress
) -> list[dict[str, Any]]:
    """A row a block, those of an interrupted run first."""
    rows = read_lines(folder / _PARTIAL, dict)
    total, done = sum(len(block.prepared) for block in blocks), sum(len(row["answers"]) for row in rows)
    with open_engine(blocks, model, n_threads=n_threads, n_gpu_layers=n_gpu_layers) as engine:
        for block in blocks[len(rows) :]:
            progress(done, total)
            started = time.monotonic()
            answers = [one.to_json() for one in answer(block, engine)]
            rows.append({"elapsed_s": time.monotonic() - started, "answers": answers})
            append_line(folder / _PARTIAL, rows[-1])
            done += len(answers)
    progress(done, total)
    return rows


def read_run(path: Path, *, cached: bool = True) -> Run:
    """A run file. Raises NotFoundError, UsageError for another file."""
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist", fix="check the path")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Run(
            task=data["task"],
            score=data["score"],
            settings=data["settings"],
            model=data["model"]["name"],
            sha256=data["model"]["sha256"],
            size_bytes=data["model"]["size_bytes"],
            chance=data["chance"],
            elapsed_s=data["elapsed_s"],
            answers=tuple(Answer(**one) for one in data["answers"]),
            path=path,
            cached=cached,
        )
    except MALFORMED as error:
        raise UsageError(f"{path} is no run of `dynrun eval`", fix=f"give a {RUN} that it wrote") from error


def runs_of(model: Path) -> list[Run]:
    """Every finished run of this model file, by any settings, the newest first."""
    sha256, found = sha256_file(model), []
    for manifest in (stages_dir() / _STAGE).glob(f"*/{MANIFEST}"):
        try:
            inputs = json.loads(manifest.read_text(encoding="utf-8"))["inputs"]
        except (OSError, ValueError, KeyError):
            continue
        if inputs.get("model") == sha256:
            found.append(manifest)
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [read_run(manifest.with_name(RUN)) for manifest in found]


def comparable(first: Sequence[Run], second: Sequence[Run]) -> list[tuple[Run, Run]]:
    """For each task and settings the pair with most questions in common, the newest first.

    Two single runs are a pair as they are: :func:`flips` says what they differ in.
    """
    if len(first) == len(second) == 1:
        return [(first[0], second[0])]
    found: dict[str, tuple[int, Run, Run]] = {}
    for one in first:
        ids = {answered.id for answered in one.answers}
        for other in second:
            if (one.task, one.settings) != (other.task, other.settings):
                continue
            common = sum(answered.id in ids for answered in other.answers)
            key = json.dumps([one.task, one.settings], sort_keys=True)
            if common and (key not in found or common > found[key][0]):
                found[key] = (common, one, other)
    return [(one, other) for _, one, other in found.values()]


def flips(first: Run, second: Run) -> Flips:
    """From ``first`` to ``second``, over the questions that both were asked.

    Raises UsageError for runs of different tasks or settings, or without a common question.
    """
    if first.task != second.task:
        raise UsageError(f"{first.path} is of {first.task}, {second.path} of {second.task}", fix="compare one task")
    for key in sorted({*first.settings, *second.settings}):
        if first.settings.get(key) != second.settings.get(key):
            raise UsageError(
                f"the runs differ in {key}: {first.settings.get(key)!r} and {second.settings.get(key)!r}",
                fix="run both with the same settings",
            )
    others = {one.id: one for one in second.answers}
    both = [(one, others[one.id]) for one in first.answers if one.id in others]
    if not both:
        raise UsageError("the runs have no question in common", fix="run both on the same data")
    score = first.score
    return count_flips(
        [one.gold for one, _ in both],
        [one.choice(score) for one, _ in both],
        [other.choice(score) for _, other in both],
    )


def _accuracy(answers: tuple[Answer, ...] | list[Answer], score: Score) -> Accuracy:
    return Accuracy(sum(one.choice(score) == one.gold for one in answers), len(answers))


def _scores(task: str) -> tuple[Score, ...]:
    """The scores that mean something for a task."""
    return ("acc",) if task.startswith("mmlu") else ("acc", "acc_norm", "acc_tokens")
