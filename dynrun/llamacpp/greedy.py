"""Greedy continuations: the most probable token, again and again, for many prompts at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from dynrun.llamacpp.engine import Engine, Piece


def continue_greedily(
    engine: Engine, prompts: Sequence[Sequence[int]], n_tokens: int, end: Collection[int] = ()
) -> list[list[int]]:
    """Up to ``n_tokens`` tokens behind each prompt; one of ``end`` is the last of its continuation.

    The engine's context must hold all prompts with their continuations. Raises ValueError for too many sequences or
    too long a prompt.
    """
    engine.forget()
    found: list[list[int]] = []
    for i, prompt in enumerate(prompts):
        rows = engine.extend([Piece(i, 0, prompt, (len(prompt) - 1,))])
        found.append([int(rows[0].argmax())])
    for step in range(1, n_tokens):
        running = [i for i, one in enumerate(found) if one[-1] not in end]
        if not running:
            break
        rows = engine.extend([Piece(i, len(prompts[i]) + step - 1, found[i][-1:], (0,)) for i in running])
        for i, token in zip(running, np.argmax(rows, axis=1), strict=True):
            found[i].append(int(token))
    return found
