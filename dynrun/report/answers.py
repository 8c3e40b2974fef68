"""Answers to questions, for a report: the stored runs of its files (evaluation/runs.py), with flips of each.

Takes files, gives :class:`TaskResult`s; asks nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from dynrun.evaluation.runs import Run, flips, runs_of
from dynrun.report.data import TaskResult

REFERENCE = "reference"


def task_results(reference: Path, files: Mapping[str, Path]) -> tuple[TaskResult, ...]:
    """Every task that one of ``files`` (by name) has been asked, the reference's own answers first where there are any.

    Runs of one task with other settings or other questions are tasks of their own. The newest of equal runs counts.
    """
    groups: dict[str, dict[str, Run]] = {}
    for name, path in {REFERENCE: reference, **files}.items():
        for run in runs_of(path):
            groups.setdefault(_key(run), {}).setdefault(name, run)
    found, labels = [], set()
    for _, group in sorted(groups.items()):
        if set(group) == {REFERENCE}:
            continue
        label = task_name(next(iter(group.values())))
        while label in labels:
            label += ", other questions or settings"
        labels.add(label)
        found += [_result(label, name, run, group.get(REFERENCE)) for name, run in group.items()]
    return tuple(found)


def _key(run: Run) -> str:
    ids = sorted(answer.id for answer in run.answers)
    return json.dumps([run.task, dict(run.settings), run.score, ids], sort_keys=True)


def task_name(run: Run) -> str:
    """As ``MMLU 5-shot``: the name, the shots, and what the answer was begun with."""
    shots, prefix = run.settings.get("shots"), run.settings.get("answer_prefix")
    name = "MMLU" if run.task == "mmlu" else run.task
    return f"{name} {shots}-shot" + (f", “{prefix}”" if prefix else "")


def _result(label: str, name: str, run: Run, reference: Run | None) -> TaskResult:
    accuracy, gained = run.accuracy(), run.efficiency
    changed = flips(reference, run) if reference is not None and name != REFERENCE else None
    return TaskResult(
        task=label,
        name=name,
        accuracy=accuracy.value,
        ci95=accuracy.ci95,
        n_questions=accuracy.questions,
        size_bytes=run.size_bytes,
        efficiency_per_gib=gained.per_gib if gained else None,
        efficiency_per_gb=gained.per_gb if gained else None,
        right_to_wrong=changed.right_to_wrong if changed else None,
        wrong_to_right=changed.wrong_to_right if changed else None,
    )
