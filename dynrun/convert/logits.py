"""Does the GGUF do the same? The logits of 64 tokens by llama.cpp beside those of transformers, in float32.

Takes what :func:`convert` gave. The tokens of the text by both tokenizers are compared as well.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynrun.config import Config
from dynrun.convert.environment import Say, conversion_environment
from dynrun.convert.folder import Source
from dynrun.convert.stage import Converted, show_files
from dynrun.errors import DoesNotFitError, DynrunError
from dynrun.llamacpp.engine import Engine
from dynrun.llamacpp.process import capture, new_log
from dynrun.scoring.divergence import divergence

N_TOKENS = 64
# Weights rounded once more, and kernels that add up in another order.
MOST_KLD = 1e-3
_SCRIPT = Path(__file__).parent / "logits_hf.py"
_TEXT = """The river rose 3.25 metres in 1997, and 12,480 people left their homes. "Why now?" asked Ana. — Porque llovió
toda la noche. def area(r): return 3.14159 * r ** 2  # größer als π? 東京 has 14 million people; I guess they'll ask.
"""


@dataclass(frozen=True)
class Agreement:
    """``kld``: mean KL divergence (nats) of the GGUF's next-token distributions from transformers', over ``n_tokens``;
    ``same_top``: the share of positions with the same most likely token."""

    kld: float
    same_top: float
    n_tokens: int
    n_text_tokens: int


def check_logits(converted: Converted, config: Config, say: Say) -> Agreement:
    """Compare. Raises DynrunError where tokens differ or the KLD exceeds :data:`MOST_KLD`; DoesNotFitError where the
    model in float32 is larger than the memory."""
    _check_memory(converted.source)
    tokens, theirs = _by_transformers(converted.source, say)
    with Engine.open(converted.path, n_ctx=N_TOKENS, n_threads=config.n_threads, n_gpu_layers=0) as engine:
        own = engine.tokenize(_TEXT, parse_special=True, add_special=False)
        if own != tokens:
            at = next(
                (i for i, (a, b) in enumerate(zip(own, tokens, strict=False)) if a != b), min(len(own), len(tokens))
            )
            raise DynrunError(
                f"{converted.path} reads text into other tokens than transformers, from token {at} of {len(tokens)}",
                fix="do not use it; report the model",
            )
        ours = engine.logits(tokens[:N_TOKENS])
    width = min(theirs.shape[1], ours.shape[1])
    measured = divergence(theirs[:, :width], ours[:, :width])
    same = float(np.mean(np.argmax(theirs[:, :width], axis=1) == np.argmax(ours[:, :width], axis=1)))
    found = Agreement(float(np.mean(measured.kld)), same, len(theirs), len(tokens))
    # Not >: a nan fails it too.
    if not found.kld <= MOST_KLD:
        raise DynrunError(
            f"{converted.path} is another model than its source: mean KLD {found.kld:.2e} over {N_TOKENS} tokens",
            fix="do not use it; report the model",
        )
    return found


def _check_memory(source: Source) -> None:
    import psutil

    needed, free = 4 * sum(tensor.n_elements for tensor in source.tensors.values()), psutil.virtual_memory().available
    if needed > free:
        raise DoesNotFitError(
            f"the check needs {needed / 1e9:.1f} GB of memory for the model in float32; {free / 1e9:.1f} GB are free",
            fix="leave --check out",
        )


def _by_transformers(source: Source, say: Say) -> tuple[list[int], np.ndarray]:
    environment = conversion_environment(say)
    work = Path(tempfile.mkdtemp(prefix="dynrun-check-"))
    try:
        (work / "text.txt").write_text(_TEXT, encoding="utf-8")
        shown = show_files(source, work / source.name, trusted=False)
        out = work / "logits.npz"
        argv = environment.command(_SCRIPT, shown, work / "text.txt", out, str(N_TOKENS))
        log = new_log("check")
        capture(argv, log=log, env=environment.variables(work), cwd=work)
        with np.load(out) as found:
            return [int(token) for token in found["tokens"]], found["logits"]
    finally:
        shutil.rmtree(work, ignore_errors=True)
