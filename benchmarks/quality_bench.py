"""What all cells of one model share in benchmarks/quality.py: texts, imatrix, errors, and what rounds with feedback.

Takes settings and stages of the product; chooses no types and measures nothing itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import quality_rows as rows
from quality_methods import SquaredErrors, all_squared_errors
from quality_rows import OURS, method_name

from dynrun.artifacts import key_of
from dynrun.calibration.imatrix import read_imatrix
from dynrun.calibration.stage import ImatrixStage
from dynrun.gguf.layout import tensor_bytes
from dynrun.gguf.quantizable import candidate_types, quantizable
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp.build import installation
from dynrun.models import Reference
from dynrun.rounding.store import Feedback
from dynrun.scoring.reference import Scored, parts_key
from dynrun.stages import Settings, Texts, feedback_of, statistics

Method = tuple[str, int | None]
"""(name, seed)."""


class Narrator:
    """Stages and notes on stderr."""

    def stage(self, name: str, detail: str) -> None:
        log(f"{name}: {detail}")

    def progress(self, done: float, total: float, note: str = "") -> None:
        if done >= total:
            log(f"  {done:,.0f} {note}")


def log(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)


def named(text: str) -> tuple[str, str]:
    """An option's NAME=FILE."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name, value


@dataclass(frozen=True)
class Bench:
    """All that the cells of one model share. ``parts``: what is scored, by the name of the text; ``stack`` closes what
    is opened on the way."""

    reference: Reference
    imatrix: ImatrixStage
    texts: Texts
    parts: Mapping[str, Sequence[Scored]]
    settings: Settings
    out: Path
    schemes: Path | None
    keep: bool
    stack: ExitStack

    @cached_property
    def feedback(self) -> Feedback:
        """What rounds with feedback, for the whole run; the covariance is collected by the first that asks."""
        collected = statistics(self.reference, self.texts, self.settings, Narrator())
        opened = feedback_of(self.reference, collected, self.settings)
        found = self.stack.enter_context(opened)
        assert found is not None, "the settings are without feedback"
        return found

    @cached_property
    def sizes(self) -> dict[str, dict[str, int]]:
        """tensor → type of the menu that it can have → bytes."""
        header, entries = self.reference.header, read_imatrix(self.imatrix.path).sums
        return {
            name: {
                one: tensor_bytes(tensor, one)
                for one in candidate_types(tensor, self.settings.menu, entries, header.metadata)
            }
            for name, tensor in quantizable(header).items()
        }

    @cached_property
    def errors(self) -> dict[str, SquaredErrors]:
        """Weighted squared errors of every type on every tensor."""
        inputs = [self.reference.sha256, self.imatrix.sha256, installation().commit, list(self.settings.menu)]
        path = self.out / f"errors-{key_of({'inputs': inputs})}.jsonl"
        log("weighted squared errors of all types")
        weights, imatrix = WeightFile(self.reference.path), read_imatrix(self.imatrix.path)
        types = {name: list(found) for name, found in self.sizes.items()}
        return all_squared_errors(weights, imatrix, types, path, self.settings.config.n_threads)

    def key(self, text: str) -> str:
        """Cells with equal keys may be compared."""
        scored = parts_key(self.parts[text])
        inputs = [self.reference.sha256, self.imatrix.sha256, scored, installation().commit, installation().backend]
        return key_of({"inputs": inputs})

    def missing(self, label: str, method: Method) -> list[str]:
        """The texts on which this file has not been measured."""
        known = {(*cell.place, cell.key) for cell in rows.load(self.out)}
        return [t for t in self.parts if (self.reference.name, label, *method, t, self.key(t)) not in known]

    def scheme_path(self, label: str, method: Method) -> Path:
        """Where the scheme of a file is left."""
        own = "" if method[0] == OURS else f"-{method_name(*method).replace(':', '').replace('/', '-')}"
        return self.out / "schemes" / f"{self.reference.name}-{label}{own}.scheme.toml"

    def has_rows(self, label: str, method: Method) -> bool:
        """Whether a file has been measured on any text, with this imatrix and this llama.cpp."""
        return len(self.missing(label, method)) < len(self.parts)
