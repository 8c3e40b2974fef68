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
    rounded = {n: t for n, t in types.items() if n not in plain and feedback.choice(n, t).strength is not None}
    done = 0

    def data_of(name: str) -> npt.NDArray[np.uint8]:
        nonlocal done
        done += 1
        on_tensor(done, len(rounded))
        made = feedback.data(name, types[name])
        assert made is not None
        return made

    rewrite(source, path, rounded, data_of)
    return list(rounded)
