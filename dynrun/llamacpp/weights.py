"""The weights of a loaded model: where each lies, in how many copies, and whether values may go there.

Takes pointers that a decode showed, gives descriptions; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dynrun.llamacpp.graph import FindTensors, sources
from dynrun.llamacpp.library import Ggml, GgmlTensor


@dataclass(frozen=True)
class Weight:
    """A weight of the loaded model: ggml type id and ``shape`` in ggml order [ne0, ne1, ...].

    ``copies``: its other tensors; off the CPU llama.cpp loads tied embeddings twice (TENSOR_DUPLICATED).
    """

    name: str
    pointer: int
    type_id: int
    shape: tuple[int, ...]
    copies: tuple[int, ...] = ()


class FindCopies(FindTensors):
    """Also every tensor of the same name: ``copies[name]``."""

    def __init__(self, lib: Ggml, names: Iterable[str]) -> None:
        super().__init__(lib, names)
        self.copies: dict[str, set[int]] = {}

    def ask(self, pointer: int, node: GgmlTensor) -> bool:
        for source in sources(node):
            name = GgmlTensor.from_address(source).name.decode("utf-8", "replace")
            if name in self.wanted:
                self.copies.setdefault(name, set()).add(source)
        return super().ask(pointer, node)


def described(name: str, pointer: int, copies: set[int]) -> Weight:
    """The weight at ``pointer``."""
    tensor = GgmlTensor.from_address(pointer)
    shape = list(tensor.ne)
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    return Weight(name, pointer, tensor.type, tuple(shape), tuple(copies - {pointer}))


def is_finite(data: npt.NDArray[Any], type_id: int) -> bool:
    """Whether all values of a weight in full precision are; of a quantized one nobody can tell."""
    # Bits that are all set in NaN and infinity: of float32, float16, bfloat16.
    dtype, mask = {0: ("<u4", 0x7F800000), 1: ("<u2", 0x7C00), 30: ("<u2", 0x7F80)}.get(type_id, ("u1", 0))
    plain = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    # Another size is refused elsewhere.
    if not mask or plain.size % np.dtype(dtype).itemsize:
        return True
    return not bool(((plain.view(dtype) & mask) == mask).any())
