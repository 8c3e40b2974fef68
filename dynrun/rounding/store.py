"""Tensors rounded with feedback, on disk: each (tensor, type) is rounded once, whichever schemes it is part of.

Takes a reference, its imatrix and covariance; gives bytes in the final type, or None where plain rounding is better.
What a killed run finished is found again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynrun.artifacts import StageFolder, append_line, atomic_path, read_lines, stage_folder
from dynrun.calibration.imatrix import read_imatrix
from dynrun.calibration.stage import CovarianceStage, ImatrixStage
from dynrun.gguf.tensor_types import FULL_PRECISION, TENSOR_TYPES
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.library import ggml
from dynrun.models import Reference
from dynrun.rounding.choice import PLAIN, Choice, choose, strength_of
from dynrun.rounding.factor import Factor
from dynrun.rounding.feedback import Bytes, Rounder, Rows
from dynrun.rounding.settings import FeedbackSettings
from dynrun.rounding.source import Source

_CHOICES_FILE = "choices.jsonl"
_STRENGTHS_FILE = "strengths.jsonl"
# Values rounded at once; fixed, as matrix products of another shape may round otherwise.
_CHUNK_VALUES = 1 << 25


@dataclass(frozen=True)
class Rounded:
    """A tensor in its final type: ``data`` [n_rows, bytes per row] and what it stands for [n_rows, ne0]."""

    data: Bytes
    values: Rows


class Feedback:
    """Rounds tensors of one model; open it with :func:`open_feedback`. ``text``: how, for people and to repeat it."""

    def __init__(self, folder: StageFolder, source: Source, rounder: Rounder, text: str) -> None:
        self.folder, self.source, self._rounder, self.text = folder, source, rounder, text
        self._choices = dict(read_lines(folder / _CHOICES_FILE, _parsed))
        self._strengths = dict(read_lines(folder / _STRENGTHS_FILE, _parsed_strength))

    @property
    def key(self) -> str:
        """Content address of all that the bytes depend on, but the types."""
        return self.folder.key

    def applies(self, name: str, type_name: str) -> bool:
        """Whether a tensor can have feedback in a type."""
        return type_name not in FULL_PRECISION and self.source.has(name)

    def choice(self, name: str, type_name: str) -> Choice:
        """With what a tensor is rounded, and what that gives on held-out activations."""
        return self.choices(name, [type_name])[0]

    def choices(self, name: str, types: Sequence[str]) -> list[Choice]:
        """:meth:`choice` in each of ``types``."""
        able = [type_name for type_name in types if self.applies(name, type_name)]
        if wanted := [type_name for type_name in able if (name, type_name) not in self._choices]:
            found = choose(self.source, self._rounder, name, wanted, self._strength(name))
            for type_name, choice in zip(wanted, found, strict=True):
                self._choices[name, type_name] = choice
                append_line(self.folder / _CHOICES_FILE, [name, type_name, choice.strength, choice.ratio])
        return [self._choices[name, one] if one in able else PLAIN for one in types]

    def _strength(self, name: str) -> float:
        """Of a tensor's input: the damping belongs to what all tensors that read it share."""
        input_of = self.source.covariance.input_of
        first = input_of[name]
        if first not in self._strengths:
            # The same one whichever of them is asked for first; an imported imatrix may lack an entry of some.
            able = [other for other, its in input_of.items() if its == first and self.source.has(other)]
            judge = first if first in able else min(able)
            self._strengths[first] = strength_of(self.source, self._rounder, judge)
            append_line(self.folder / _STRENGTHS_FILE, [first, self._strengths[first]])
        return self._strengths[first]

    def data(self, name: str, type_name: str) -> Bytes | None:
        """The tensor's bytes [n_rows, bytes per row], rounded with feedback; None where plain rounding is better."""
        strength = self.choice(name, type_name).strength
        if strength is None:
            return None
        path = self.folder / f"{name}.{type_name}.npy"
        if path.is_file():
            found: Bytes = np.load(path)
            return found
        made = self._round(name, type_name, strength)
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, made)
        return made

    def tensor(self, name: str, type_name: str) -> Rounded | None:
        """:meth:`data`, and what it stands for."""
        if (data := self.data(name, type_name)) is None:
            return None
        n = self.source.weights.header.tensors[name].shape[0]
        return Rounded(data, ggml().dequantize(TENSOR_TYPES[type_name].ggml_id, data, len(data), n))

    def _round(self, name: str, type_name: str, strength: float) -> Bytes:
        source, width = self.source, TENSOR_TYPES[type_name].block_size

        def parts_of(expert: int) -> Iterator[_Part]:
            rows, factor = source.rows(name, expert), source.factor(name, expert, strength, width)
            step = max(1, _CHUNK_VALUES // rows.shape[1])
            for start in range(0, len(rows), step):
                yield _Part(rows[start : start + step], factor, source.importance(name, expert))

        def rounded(part: _Part) -> Bytes:
            sweeps = source.settings.sweeps
            return self._rounder.round(part.rows, part.factor, type_name, part.importance, sweeps=sweeps)[0]

        n = source.n_expert(name)
        at_once = max(1, min(self._rounder.at_once(type_name), source.most_factors(name), self._fitting(name)))
        data: list[Bytes] = []
        for start in range(0, n, at_once):
            experts = range(start, min(n, start + at_once))
            if len(experts) > 1:
                data += self._rounder.each(rounded, [part for expert in experts for part in parts_of(expert)])
            else:
                data += map(rounded, parts_of(start))
        return np.concatenate(data)

    def _fitting(self, name: str) -> int:
        """Experts that are no more values together than what is rounded at once."""
        return _CHUNK_VALUES * self.source.n_expert(name) // self.source.weights.header.tensors[name].n_elements


@dataclass(frozen=True)
class _Part:
    """Rows of one matrix, and what they are rounded with."""

    rows: Rows
    factor: Factor
    importance: Rows


def feedback_folder(
    reference: Reference, imatrix: ImatrixStage, covariance: CovarianceStage, settings: FeedbackSettings
) -> StageFolder:
    """Where the rounded tensors lie."""
    inputs = {
        "reference": reference.sha256,
        "imatrix": imatrix.sha256,
        "covariance": covariance.key,
        "settings": settings.key(),
        "llama_cpp": installation().commit,
    }
    return stage_folder("rounding", inputs)


@contextmanager
def open_feedback(
    reference: Reference,
    imatrix: ImatrixStage,
    covariance: CovarianceStage,
    settings: FeedbackSettings,
    *,
    n_threads: int,
    memory: int | None = None,
) -> Iterator[Feedback]:
    """The store of one model's rounded tensors; one process at a time has it. ``memory``: see source.py."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = feedback_folder(reference, imatrix, covariance, settings)
    with folder.locked():
        entries = read_imatrix(imatrix.path)
        source = Source(WeightFile(reference.path), entries, covariance.covariance, settings, device, memory)
        text = settings.text(covariance.key, covariance.n_ctx)
        yield Feedback(folder, source, Rounder(n_threads, device), text)


def _parsed(line: Any) -> tuple[tuple[str, str], Choice]:
    name, type_name, strength, ratio = line
    return (name, type_name), Choice(None if strength is None else float(strength), float(ratio))


def _parsed_strength(line: Any) -> tuple[str, float]:
    name, strength = line
    return str(name), float(strength)
