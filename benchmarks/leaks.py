"""Memory of one process that loads and frees models, and replaces weights, again and again.

    python -m benchmarks.leaks [--loads 1000] [--writes 10000]

JSON on standard output: resident bytes after a tenth of each (allocators and caches are full then) and at the end.
Ends with 1 where that grew by more than 16 MB, or where files stay open.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil

from dynrun.llamacpp.engine import Engine
from dynrun.llamacpp.vocabulary import Vocabulary
from tests.tiny import write_tiny_llama

_MORE_BYTES = 16 << 20
_TOKENS = (5, 70, 71, 200, 9, 33)
_NAME = "blk.0.ffn_up.weight"


def load(path: Path) -> None:
    """A model and its vocabulary, used and freed."""
    with Engine.open(path, n_ctx=64, n_threads=1) as engine:
        assert np.isfinite(engine.logits(_TOKENS)).all()
        engine.watch_inputs([_TOKENS], lambda _: None)
    with Vocabulary.load(path) as vocabulary:
        assert vocabulary.tokenize("the cat")


def watched(n: int, work: Callable[[], None]) -> dict[str, int | list[int]]:
    """Resident bytes and open files while ``work`` is done ``n`` times."""
    process, rss = psutil.Process(), []
    for number in range(n + 1):
        if number in {n * tenth // 10 for tenth in range(1, 11)}:
            gc.collect()
            rss.append(process.memory_info().rss)
            if len(rss) == 1:
                files = process.num_fds()
        if number < n:
            work()
    grown, left = max(rss[-1] - rss[0], 0), process.num_fds() - files
    return {"times": n, "rss_bytes": rss, "grown_bytes": grown, "files_left_open": left}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=int, default=1000)
    parser.add_argument("--writes", type=int, default=10_000)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        path = write_tiny_llama(Path(folder) / "tiny.gguf", n_block=1)
        found = {"loads": watched(options.loads, lambda: load(path))}
        with Engine.open(path, n_ctx=64, n_threads=1) as engine:
            stored = engine.read(_NAME)
            # As they come: bytes, and numbers that do not lie side by side.
            forms = [np.zeros_like(stored), np.ones((stored.size // 2, 2), np.float16)[:, 0]]

            def write() -> None:
                forms.reverse()
                with engine.replaced(_NAME, forms[0]):
                    pass

            found["writes"] = watched(options.writes, write)
            assert np.array_equal(engine.read(_NAME), stored)
    print(json.dumps(found, indent=1))
    return any(one["grown_bytes"] > _MORE_BYTES or one["files_left_open"] > 0 for one in found.values())


if __name__ == "__main__":
    sys.exit(main())
