"""Flips of a file against its reference, out of stored answers: nothing is asked here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dynrun.errors import UsageError
from dynrun.evaluation.runs import comparable, flips, runs_of
from dynrun.metrics.flips import Flips


def stored_flips(reference: Path, file: Path) -> Mapping[str, Flips]:
    """By task, from ``reference`` to ``file``: of the newest runs that both have with the same settings; empty where
    there are none."""
    found: dict[str, Flips] = {}
    for one, other in comparable(runs_of(reference), runs_of(file)):
        try:
            changed = flips(one, other)
        except UsageError:
            # Their only runs, and of different tasks or questions.
            continue
        found.setdefault(one.task, changed)
    return found
