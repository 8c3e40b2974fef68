"""Where in a model NaN or infinity appears first.

Takes a loaded model and tokens, gives the name of a tensor for people; repairs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dynrun.errors import DynrunError
from dynrun.llamacpp.engine import Engine
from dynrun.llamacpp.graph import F32_TYPE, Tap, sources
from dynrun.llamacpp.library import GgmlTensor, ggml

# They show other nodes' data in another shape.
_VIEWS = ("NONE", "RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE")


class _FirstNotFinite(Tap):
    """``node``: the name of the first node, in the order of computation, that holds NaN or +∞ (−∞ is how masks say no);
    ``weight``: the weight that it is computed with, if there is one."""

    def __init__(self, engine: Engine) -> None:
        self.node = self.weight = ""
        self._views = {ggml().ops[name] for name in _VIEWS}
        self._names = {weight.pointer: name for name, weight in engine.weights.items()}

    def ask(self, pointer: int, node: GgmlTensor) -> bool:
        return not self.node and node.type == F32_TYPE and node.op not in self._views

    def got(self, pointer: int, node: GgmlTensor) -> None:
        values = ggml().tensor_bytes(pointer).view(np.float32)
        if self.node or not (np.isnan(values).any() or np.isposinf(values).any()):
            return
        self.node = node.name.decode("utf-8", "replace")
        self.weight = next((self._names[source] for source in sources(node) if source in self._names), "")


def origin_of_not_finite(engine: Engine, tokens: Sequence[int]) -> str:
    """The first tensor that is not finite when ``tokens`` are decoded, in words; "" where all are."""
    tap = _FirstNotFinite(engine)
    engine.tapped(tokens, tap)
    if not tap.node:
        return ""
    return f"{tap.node}, computed with {tap.weight}" if tap.weight else tap.node


def not_finite(engine: Engine, path: Path, tokens: Sequence[int], where: str) -> DynrunError:
    """The error for logits that are not finite: it names the tensor that made them."""
    origin = origin_of_not_finite(engine, tokens)
    reason = f": the first tensor that is not is {origin}" if origin else ""
    return DynrunError(
        f"{path} gives logits that are not finite on {where}{reason}",
        fix="the file is damaged: download or make it again",
    )
