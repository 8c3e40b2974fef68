"""Whole schemes put in place in the loaded model and measured.

What was measured is kept on disk under the scheme's types, so that an interrupted search goes on. Proposes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynrun.artifacts import append_line, key_of, read_lines
from dynrun.calibration.sequences import TokenSequence
from dynrun.llamacpp.engine import Engine
from dynrun.rounding.store import Feedback
from dynrun.scoring.divergence import divergence
from dynrun.scoring.reference import Codes, decode_logits, encode_logits
from dynrun.sensitivity.errors import Quantizer
from dynrun.sensitivity.in_place import InPlace


class SearchLog:
    """Measurements on disk, a JSON line each: (what, which) → numbers. A line torn by a kill is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found = dict(read_lines(path, _parsed))

    def add(self, key: tuple[str, ...], values: Sequence[float]) -> None:
        """Keep ``values``, on disk before this returns."""
        self.found[key] = list(values)
        append_line(self.path, [list(key), list(values)])


def _parsed(line: Any) -> tuple[tuple[str, ...], list[float]]:
    key, values = line
    return tuple(key), [float(value) for value in values]


class Bench:
    """Measures schemes on ``sequences``, rounded with ``feedback`` where it is given; loads the model once there is
    something to do."""

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        quantizer: Callable[[], Quantizer],
        sequences: Sequence[TokenSequence],
        log: SearchLog,
        feedback: Feedback | None = None,
    ) -> None:
        self._open, self._quantizer, self._feedback = open_engine, quantizer, feedback
        self.sequences, self.log = sequences, log
        self._placed: InPlace | None = None
        self._codes: list[Codes] = []

    @property
    def weights(self) -> list[int]:
        """Scored tokens of each sequence."""
        return [len(sequence.tokens) for sequence in self.sequences]

    def scheme(self, types: Mapping[str, str], plain: Collection[str] = ()) -> list[float]:
        """The mean KLD of each sequence with ``types`` in place, ``plain`` tensors without feedback."""
        key = ("scheme", types_key(types), *sorted(plain))
        if key not in self.log.found:
            placed = self._loaded()
            placed.place(types, plain)
            klds = []
            for sequence, codes in zip(self.sequences, self._codes, strict=True):
                logits = placed.engine.logits(sequence.tokens)
                klds.append(float(divergence(decode_logits(codes), logits).kld.mean()))
            self.log.add(key, klds)
        return self.log.found[key]

    def _loaded(self) -> InPlace:
        if self._placed is None:
            engine = self._open()
            # The original's logits first: from here on the model holds schemes.
            self._codes = [encode_logits(engine.logits(sequence.tokens)) for sequence in self.sequences]
            self._placed = InPlace(engine, self._quantizer(), self._feedback)
        return self._placed

    def close(self) -> None:
        """Free the model."""
        if self._placed is not None:
            self._placed.engine.close()
            self._placed = None


def types_key(types: Mapping[str, str]) -> str:
    """Content address of a scheme's types."""
    return key_of({"types": dict(sorted(types.items()))})
