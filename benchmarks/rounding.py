"""Seconds that rounding a matrix with feedback takes, by shape and type, and a hash of the bytes.

    .venv/bin/python benchmarks/rounding.py [--threads N] [--beside N]

To compare two commits: with the PYTHONPATH of each, one after the other on the same machine. ``--beside``: processes
that keep a core busy meanwhile.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import time

import numpy as np

from dynrun.llamacpp.library import ggml
from dynrun.rounding.factor import Factor, factor
from dynrun.rounding.feedback import Rounder, Rows

# Columns, rows, types: of a model of 1.5 billion weights, of an expert of a small one, of the rows that a choice takes.
CASES = (
    (1536, 8960, ("Q3_K", "IQ4_XS", "IQ3_XXS")),
    (8960, 1536, ("Q4_K",)),
    (1536, 576, ("Q4_K", "IQ2_XS")),
    (1536, 64, ("Q3_K", "IQ4_XS", "IQ3_S")),
)


def matrix(n: int, n_rows: int) -> tuple[Rows, Factor, Rows]:
    """Weights, the factor of inputs with fewer directions than columns, and the imatrix entry."""
    random = np.random.default_rng(n)
    x = random.standard_normal((n // 2, n), dtype=np.float32)
    h = x.T @ x
    rows = random.standard_normal((n_rows, n), dtype=np.float32) * np.exp(random.standard_normal((n_rows, 1)))
    return rows.astype(np.float32), factor(h, 1e-3, np.arange(n), shrink=0.5), np.diag(h) / np.float32(len(x))


def busy() -> None:
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--beside", type=int, default=0)
    options = parser.parse_args()
    # Before torch, as in the commands: it says how idle threads wait.
    ggml()
    others = [multiprocessing.Process(target=busy, daemon=True) for _ in range(options.beside)]
    for other in others:
        other.start()
    rounder = Rounder(options.threads)
    for n, n_rows, types in CASES:
        rows, its_factor, importance = matrix(n, n_rows)
        for type_name in types:
            began, spent = time.perf_counter(), time.process_time()
            data, _ = rounder.round(rows, its_factor, type_name, importance, sweeps=1)
            took, spent = time.perf_counter() - began, time.process_time() - spent
            digest = hashlib.sha256(data.tobytes()).hexdigest()[:8]
            print(f"{n:5} × {n_rows:5} {type_name:8} {took:7.2f} s, {spent:7.2f} s of cores  {digest}", flush=True)


if __name__ == "__main__":
    main()
