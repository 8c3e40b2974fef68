"""Tensors quantized and put back in the loaded model, in its own full precision.

What a quantized file's kernels do to activations (they quantize them to 8 bits) is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dynrun.gguf.tensor_types import FULL_PRECISION, TYPE_OF_ID
from dynrun.gguf.weights import encode
from dynrun.llamacpp.engine import Engine
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


@dataclass
class InPlace:
    """Whole schemes in one loaded model; only what differs from the one before is written."""

    engine: Engine
    quantizer: Quantizer
    _types: dict[str, str] = field(default_factory=dict)
    _kept: dict[tuple[str, str], npt.NDArray[np.uint8]] = field(default_factory=dict)
    _kept_bytes: int = 0

    def place(self, types: Mapping[str, str]) -> None:
        """Have ``types`` in the model from now on, the original where it names none."""
        for name in [n for n in self._types if n not in types]:
            original = self.quantizer.weights.rows(name)
            self.engine.write(name, encode(original, stored_as(self.engine, name) or ""))
            del self._types[name]
        for name, type_name in types.items():
            # What no decode touches (MTP blocks) is not loaded.
            if name in self.engine.weights and self._types.get(name) != type_name:
                self.engine.write(name, self._quantized(name, type_name))
                self._types[name] = type_name

    def _quantized(self, name: str, type_name: str) -> npt.NDArray[np.uint8]:
        data = self._kept.get((name, type_name))
        if data is None:
            data = quantized(self.engine, self.quantizer, name, type_name)[0]
            if self._kept_bytes + data.nbytes <= _KEPT_BYTES:
                self._kept[name, type_name] = data
                self._kept_bytes += data.nbytes
        return data
