"""A GGUF of the reference whose tensors are rounded with feedback, written already in their final types.

llama-quantize copies a tensor whose type is the wanted one (src/llama-quant.cpp: ``tensor->type != new_type``), so it
still makes the file; tensors that are better off with plain rounding stay in full precision here and are left to it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dynrun.gguf.header import Header
from dynrun.gguf.rewrite import rewrite
from dynrun.rounding.store import Feedback


def write_rounded(
    source: Header,
    types: Mapping[str, str],
    plain: Collection[str],
    feedback: Feedback,
    path: Path,
    on_tensor: Callable[[int, int], None],
) -> list[str]:
    """Write ``path``; the names of the tensors that are in their final type there. ``plain``: tensors to leave."""
    rounded = []
    for done, (name, type_name) in enumerate(types.items(), start=1):
        if name not in plain and feedback.tensor(name, type_name) is not None:
            rounded.append(name)
        on_tensor(done, len(types))

    def data_of(name: str) -> npt.NDArray[np.uint8]:
        made = feedback.tensor(name, types[name])
        assert made is not None
        return made.data

    rewrite(source, path, {name: types[name] for name in rounded}, data_of)
    return rounded
