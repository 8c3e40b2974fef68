"""How fast the imatrix is collected: beside llama-imatrix on the same chunks, and with the covariance.

usage: .venv/bin/python benchmarks/imatrix.py [MODEL] [--tokens 8192] [--rounds 3]

Each round runs all three, one after another, on the same text cut every 512 tokens, loading the model included; the
ratios are of the medians. llama-imatrix collects output.weight too (--process-output), as dynrun does, and computes no
perplexity (--no-ppl). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dynrun.calibration.collect import Accumulator, Checkpoint, SquareSums, inputs_of, run_pass
from dynrun.calibration.covariance import CovarianceSums, plan_passes
from dynrun.calibration.dataset import builtin
from dynrun.calibration.imatrix import write_imatrix
from dynrun.config import load_config
from dynrun.llamacpp import tools
from dynrun.llamacpp.engine import Engine
from dynrun.llamacpp.vocabulary import Vocabulary
from dynrun.models import open_reference

N_CTX = 512
_MEMORY = 4 * 10**9


def text_of(model: Path, n_tokens: int) -> tuple[str, list[list[int]]]:
    """A text of whole chunks, and the chunks as llama-imatrix cuts it."""
    text = "\n".join(conversation.words for conversation in builtin().conversations)
    with Vocabulary.load(model) as vocabulary:
        tokens = vocabulary.tokenize(text, parse_special=False, add_special=True)[:n_tokens]
        text = b"".join(map(vocabulary.piece, tokens)).decode("utf-8", "ignore")
        tokens = vocabulary.tokenize(text, parse_special=False, add_special=True)
    return text, [tokens[i : i + N_CTX] for i in range(0, len(tokens) - N_CTX + 1, N_CTX)]


def ours(model: Path, chunks: list[list[int]], folder: Path, n_threads: int, *, covariance: bool) -> None:
    """dynrun's collection of one file."""
    with Engine.open(model, n_ctx=N_CTX, n_threads=n_threads) as engine:
        inputs = inputs_of(engine)
        sums = SquareSums(inputs)
        accumulators: list[Accumulator] = [sums]
        if covariance:
            widths = {name: (engine.weights[name].shape[0], n) for name, n in inputs.items()}
            # The first pass; what is beyond its memory would be further ones.
            accumulators.append(CovarianceSums(plan_passes(widths, _MEMORY)[0]))
        run_pass(engine, [[chunk] for chunk in chunks], accumulators, Checkpoint(folder / "state.npz", every_s=1e9))
        write_imatrix(sums.imatrix(engine.input_of), folder / "ours.gguf", dataset="x", chunk_count=1, chunk_size=N_CTX)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model, n_threads = open_reference(options.model).path, load_config().n_threads
    text, chunks = text_of(model, options.tokens)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "text.txt").write_text(text, encoding="utf-8")
        ways: dict[str, Callable[[], object]] = {
            "llama-imatrix": lambda: tools.collect_imatrix(
                *(model, folder / "text.txt", folder / "theirs.gguf"),
                n_ctx=N_CTX,
                n_threads=n_threads,
                parse_special=False,
                process_output=True,
            ),
            "dynrun": lambda: ours(model, chunks, folder, n_threads, covariance=False),
            "dynrun, covariance": lambda: ours(model, chunks, folder, n_threads, covariance=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                started = time.monotonic()
                way()
                seconds[name].append(time.monotonic() - started)
    n_tokens = sum(map(len, chunks))
    speed = {name: n_tokens / statistics.median(times) for name, times in seconds.items()}
    result = {
        "tokens": n_tokens,
        "threads": n_threads,
        "seconds": {name: [round(s, 1) for s in times] for name, times in seconds.items()},
        "tokens_per_second": {name: round(one, 1) for name, one in speed.items()},
        "over_llama_imatrix": {name: round(one / speed["llama-imatrix"], 3) for name, one in speed.items()},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
