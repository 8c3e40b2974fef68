"""Tensors quantized and put back in the loaded model, in its own full precision.

What a quantized file's kernels do to activations (they quantize them to 8 bits) is not in it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dynrun.gguf.tensor_types import FULL_PRECISION, TYPE_OF_ID
from dynrun.gguf.weights import encode
from dynrun.llamacpp.engine import Engine
from dynrun.rounding.store import Feedback
from dynrun.sensitivity.errors import Quantizer


def stored_as(engine: Engine, name: str) -> str | None:
    """The full-precision type that the model holds a weight in; None for another one."""
    found = TYPE_OF_ID[engine.weights[name].type_id].name
    return found if found in FULL_PRECISION else None


def quantized(engine: Engine, quantizer: Quantizer, name: str, type_name: str) -> tuple[npt.NDArray[np.uint8], float]:
    """A tensor's bytes for the model at hand after a round trip through ``type_name``, and the error."""
    replacement = quantizer.replacement(name, type_name)
    return encode(replacement.values, stored_as(engine, name) or ""), replacement.error


# What was quantized is kept up to here: candidates share most of their tensors' types, and codebook types are slow.
_KEPT_BYTES = 2 * 10**9
# A type, and whether it is rounded with feedback.
_Form = tuple[str, bool]


@dataclass
class InPlace:
    """Whole schemes in one loaded model, rounded with ``feedback`` where it is given; only what differs from the one
    before is written."""

    engine: Engine
    quantizer: Quantizer
    feedback: Feedback | None = None
    _placed: dict[str, _Form] = field(default_factory=dict)
    _kept: dict[tuple[str, _Form], npt.NDArray[np.uint8]] = field(default_factory=dict)
    _kept_bytes: int = 0

    def place(self, types: Mapping[str, str], plain: Collection[str] = ()) -> None:
        """Have ``types`` in the model from now on, the original where it names none; ``plain`` tensors without
        feedback."""
        for name in [n for n in self._placed if n not in types]:
            original = self.quantizer.weights.rows(name)
            self.engine.write(name, encode(original, stored_as(self.engine, name) or ""))
            del self._placed[name]
        for name, type_name in types.items():
            # What no decode touches (MTP blocks) is not loaded.
            form = (type_name, self.feedback is not None and name not in plain)
            if name in self.engine.weights and self._placed.get(name) != form:
                self.engine.write(name, self._data(name, form))
                self._placed[name] = form

    def _data(self, name: str, form: _Form) -> npt.NDArray[np.uint8]:
        data = self._kept.get((name, form))
        if data is None:
            data = self._rounded(name, form)
            if self._kept_bytes + data.nbytes <= _KEPT_BYTES:
                self._kept[name, form] = data
                self._kept_bytes += data.nbytes
        return data

    def _rounded(self, name: str, form: _Form) -> npt.NDArray[np.uint8]:
        type_name, with_feedback = form
        made = self.feedback.tensor(name, type_name) if self.feedback and with_feedback else None
        if made is None:
            return quantized(self.engine, self.quantizer, name, type_name)[0]
        return encode(made.values, stored_as(self.engine, name) or "")
