"""What benches and chats teach the planner: its own placements' real speed (calibration.py keeps it)."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from dynrun.errors import DynrunError
from dynrun.gguf.header import read_header
from dynrun.runtime.calibration import note_speed
from dynrun.runtime.model_facts import facts_of
from dynrun.runtime.placement import Placement
from dynrun.runtime.this_machine import this_machine

# Fewer tokens are timed too coarsely.
LEAST_TOKENS = 64


def learn(model: Path, placement: Placement, tokens_per_second: float) -> None:
    """Keep a measured speed of text generation in ``placement``. A full disk does not matter."""
    with suppress(DynrunError, OSError):
        note_speed(facts_of(read_header(model)), this_machine(measure=False), placement, tokens_per_second)
