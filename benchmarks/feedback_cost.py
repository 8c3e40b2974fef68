"""What statistics and rounding with feedback cost beside llama-imatrix and llama-quantize: time, and peak memory.

usage: .venv/bin/python benchmarks/feedback_cost.py MODEL SCHEME --text FILE [--tokens N] [--memory SIZE] [--out DIR]

One after another, each from nothing and in processes of its own, with the same number of tokens and threads:
llama-imatrix on FILE (-c 512, output.weight too, no perplexity), llama-quantize to the types of SCHEME with that
imatrix, and `dynrun quantize MODEL SCHEME --feedback`, which collects imatrix and covariance, rounds, and drives
llama-quantize. Memory is the largest resident set of any of its processes, mapped pages of the model included. Prints
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynrun.config import load_config
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.tools import write_tensor_types
from dynrun.paths import cache_dir
from dynrun.scheme import read_scheme

N_CTX = 512


@dataclass(frozen=True)
class Cost:
    """Seconds, and bytes of memory."""

    seconds: float
    memory: int


def measure(command: Sequence[str | Path], folder: Path, **environment: str) -> Cost:
    """Of ``command``, run in ``folder``. Exits where it fails."""
    started = time.monotonic()
    print("$", *command, file=sys.stderr)
    process = subprocess.Popen(command, cwd=folder, env=os.environ | environment, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(f"{command[0]} exited with {code}")
    # Kilobytes, but on macOS; of the process and those that it waited for, whichever is greatest.
    return Cost(time.monotonic() - started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def theirs(options: argparse.Namespace, folder: Path) -> dict[str, Cost]:
    """llama-imatrix and llama-quantize."""
    scheme, threads = read_scheme(options.scheme), str(load_config().n_threads)
    write_tensor_types(scheme.types, folder / "types.txt")
    program, chunks = installation().program, str(options.tokens // N_CTX)
    imatrix: list[str | Path] = [program("llama-imatrix"), "-m", options.model, "-f", options.text, "-o", "theirs.gguf"]
    imatrix += ["-c", str(N_CTX), "-t", threads, "--chunks", chunks, "--process-output", "--no-ppl"]
    quantize: list[str | Path] = [program("llama-quantize"), "--imatrix", "theirs.gguf"]
    quantize += ["--tensor-type-file", "types.txt", options.model, "theirs-out.gguf", scheme.label, threads]
    return {"llama-imatrix": measure(imatrix, folder), "llama-quantize": measure(quantize, folder)}


def ours(options: argparse.Namespace, folder: Path) -> Cost:
    """`dynrun quantize`, with an empty cache but for the compiled llama.cpp."""
    (folder / "cache").mkdir()
    (folder / "cache" / "builds").symlink_to((cache_dir() / "builds").resolve())
    dynrun = Path(sys.executable).with_name("dynrun")
    command = [dynrun, "quantize", options.model, options.scheme, "--feedback", "-o", "ours.gguf"]
    command += ["--tokens", str(options.tokens)]
    if options.memory:
        command += ["--memory", options.memory]
    return measure(command, folder, DYNRUN_CACHE=str(folder / "cache"))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("scheme", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--memory")
    parser.add_argument("--out", type=Path, help="where its files lie while it runs")
    options = parser.parse_args()
    options.model, options.scheme, options.text = (x.resolve() for x in (options.model, options.scheme, options.text))
    with tempfile.TemporaryDirectory(dir=options.out) as temporary:
        costs = theirs(options, Path(temporary))
        both = sum(cost.seconds for cost in costs.values())
        costs["dynrun"] = mine = ours(options, Path(temporary))
    reference = options.model.stat().st_size
    result = {
        "tokens": options.tokens,
        "threads": load_config().n_threads,
        "seconds": {name: round(cost.seconds, 1) for name, cost in costs.items()},
        "peak_gb": {name: round(cost.memory / 1e9, 2) for name, cost in costs.items()},
        "times_both": round(mine.seconds / both, 2),
        "gb_over_reference": round((mine.memory - reference) / 1e9, 2),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
