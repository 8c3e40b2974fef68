"""What `dynrun eval kld` costs over its forward passes, and against llama-perplexity on the same chunks.

usage: .venv/bin/python benchmarks/eval_kld.py [MODEL] [--text FILE] [--chunks 16] [--labels Q3_K_M,Q4_K_M,Q8_0]

Three times of one run, each with its models loaded from the page cache; seconds of the clock, and of all processors
(which other work on the machine disturbs less):
  forward     the reference and the three files loaded, every chunk decoded, the logits thrown away
  eval kld    the command in an empty cache of its own: reference recorded, three files compared, intervals, table
  perplexity  llama-perplexity with --kl-divergence-base, then --kl-divergence for each file
and what both say of mean KLD and same top p.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dynrun.calibration.dataset import builtin
from dynrun.calibration.splits import split_of_source
from dynrun.config import load_config
from dynrun.evaluation.texts import text_parts
from dynrun.llamacpp import tools
from dynrun.llamacpp.vocabulary import Vocabulary
from dynrun.models import resolve
from dynrun.scoring.reference import Scored, open_for, score

N_CTX = 512


@dataclass(frozen=True)
class Cost:
    """Seconds of the clock and of processors, this one's and its children's."""

    wall_s: float
    cpu_s: float

    def over(self, other: Cost) -> dict[str, float]:
        return {"wall": round(self.wall_s / other.wall_s, 3), "cpu": round(self.cpu_s / other.cpu_s, 3)}


@contextmanager
def timed() -> Iterator[list[Cost]]:
    """The cost of the block, in the list when it is over."""
    found: list[Cost] = []
    started, cpu = time.monotonic(), _cpu_s()
    yield found
    found.append(Cost(round(time.monotonic() - started, 1), round(_cpu_s() - cpu, 1)))


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def quantized(reference: Path, labels: Sequence[str], folder: Path, n_threads: int) -> list[Path]:
    """A file of each preset, without an imatrix: only their speed and their KLD's agreement matter here."""
    for label in labels:
        tools.quantize(reference, f"{label}.gguf", label, folder=folder, n_threads=n_threads)
    return [folder / f"{label}.gguf" for label in labels]


def forward(models: Sequence[Path], parts: Sequence[Scored], n_threads: int) -> None:
    """The passes alone, loads included."""
    for model in models:
        with open_for(model, parts, n_threads=n_threads) as engine:
            for part in parts:
                for _ in score(engine, part):
                    pass


def command(reference: Path, files: Sequence[Path], text: Path, n_tokens: int, cache: Path) -> Any:
    """The rows of the whole command."""
    argv = [sys.executable, "-m", "dynrun.cli.app", "eval", "kld", reference, *files, "--text", text]
    argv += ["--tokens", str(n_tokens), "--ctx", str(N_CTX), "--json"]
    done = subprocess.run(
        argv, capture_output=True, text=True, check=True, env={**os.environ, "DYNRUN_CACHE": str(cache)}
    )
    return json.loads(done.stdout)["rows"]


def perplexity(
    reference: Path, files: Sequence[Path], text: Path, folder: Path, n_threads: int
) -> list[tools.PerplexityKld]:
    """What llama-perplexity's base and comparisons say."""
    base = folder / "base.kld"
    tools.perplexity_base(reference, text, base, n_ctx=N_CTX, n_threads=n_threads)
    return [tools.perplexity_kld(file, base, n_ctx=N_CTX, n_threads=n_threads) for file in files]


def chunked(reference: Path, source: Path | None, n_chunks: int, out: Path) -> list[Scored]:
    """Write a text of exactly ``n_chunks`` chunks to ``out``: llama-perplexity reads it to its end."""
    if source is None:
        messages = [m.get("content") or "" for c in split_of_source(builtin(), "test") for m in c.messages]
        words = "\n\n".join(messages)
    else:
        words = source.read_text(encoding="utf-8")
    with Vocabulary.load(reference) as vocabulary:
        low, high = 0, len(words)
        while low < high:
            middle = (low + high) // 2
            n_tokens = len(vocabulary.tokenize(words[:middle], parse_special=False, add_special=True))
            low, high = (middle + 1, high) if n_tokens < n_chunks * N_CTX else (low, middle)
        out.write_text(words[:low], encoding="utf-8")
        return text_parts(vocabulary, words[:low], max_tokens=n_chunks * N_CTX, n_ctx=N_CTX)


def main() -> None:
    """Run it and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--labels", default="Q3_K_M,Q4_K_M,Q8_0")
    options = parser.parse_args()
    n_threads, reference = load_config().n_threads, resolve(options.model).path
    labels = options.labels.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = folder / "text.txt"
        parts = chunked(reference, options.text, options.chunks, text)
        files = quantized(reference, labels, folder, n_threads)
        with timed() as passes:
            forward([reference, *files], parts, n_threads)
        with timed() as ours:
            rows = command(reference, files, text, options.chunks * N_CTX, folder / "cache")
        with timed() as oracle:
            theirs = perplexity(reference, files, text, folder, n_threads)
    result = {
        "chunks": len(parts),
        "forward": asdict(passes[0]),
        "eval_kld": asdict(ours[0]),
        "perplexity": asdict(oracle[0]),
        "eval_kld_over_forward": ours[0].over(passes[0]),
        "eval_kld_over_perplexity": ours[0].over(oracle[0]),
        "agreement": {
            label: {
                "kld": row["kld"]["mean"],
                "perplexity_kld": other.mean_kld,
                "kld_ratio": round(row["kld"]["mean"] / other.mean_kld, 5),
                "same_top_p_difference": round(100 * row["same_top_p"] - other.same_top_p, 3),
            }
            for label, row, other in zip(labels, rows, theirs, strict=True)
        },
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
