"""How long the sensitivity sweep takes: against its own forward passes, and against a file and a run a tensor.

usage: .venv/bin/python benchmarks/sweep.py [MODEL] [--tensors 5]

The sweep is run if it is not cached. The other way is measured on a few tensors, spread over the model, and
extrapolated: llama-quantize with only that tensor quantized, then llama-perplexity --kl-divergence on 1,024 scored
tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from dynrun.calibration.dataset import builtin
from dynrun.calibration.imatrix import read_imatrix
from dynrun.calibration.splits import split
from dynrun.config import load_config
from dynrun.gguf.quantizable import candidate_types, quantizable
from dynrun.gguf.tensor_types import DEFAULT_MENU
from dynrun.llamacpp import tools
from dynrun.models import Reference, open_reference
from dynrun.sensitivity.units import probe_types
from dynrun.stages import Settings, imatrix_stage, read_texts, sensitivity_stage

N_CTX = 512
# llama-perplexity scores the second half of each chunk: eight chunks are 2,040 tokens, of which it scores 1,020.
N_CHUNKS = 9


class Quiet:
    """A reporter that says only which stage runs."""

    def stage(self, name: str, detail: str) -> None:
        print(f"{name}: {detail}", file=sys.stderr)

    def progress(self, done: float, total: float, note: str = "") -> None:
        pass


def by_files(reference: Reference, imatrix: Path, names: list[str], n_threads: int) -> list[float]:
    """Seconds for both types of each tensor, by files and llama-perplexity."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text, base = folder / "text.txt", folder / "base.kld"
        words = [str(m["content"]) for c in split(builtin().conversations, "probe") for m in c.messages]
        text.write_text("\n".join(words)[: N_CHUNKS * N_CTX * 3])
        tools.perplexity_base(reference.path, text, base, n_ctx=N_CTX, n_threads=n_threads)
        (folder / "imatrix.gguf").write_bytes(imatrix.read_bytes())
        return [_by_file(reference, imatrix, name, folder, base, n_threads) for name in names]


def _by_file(reference: Reference, imatrix: Path, name: str, folder: Path, base: Path, n_threads: int) -> float:
    started = time.monotonic()
    tensors = quantizable(reference.header)
    candidates = candidate_types(tensors[name], DEFAULT_MENU, read_imatrix(imatrix).sums, reference.header.metadata)
    for type_name in probe_types(candidates):
        tools.write_tensor_types({n: type_name if n == name else "F16" for n in tensors}, folder / "types.txt")
        tools.quantize(
            *(reference.path, "one.gguf", "Q4_K_M"),
            folder=folder,
            n_threads=n_threads,
            imatrix="imatrix.gguf",
            tensor_type_file="types.txt",
        )
        tools.perplexity_kld(folder / "one.gguf", base, n_ctx=N_CTX, n_threads=n_threads)
    return time.monotonic() - started


def main() -> None:
    """Run it and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--tensors", type=int, default=5)
    options = parser.parse_args()
    settings = Settings(config=load_config())
    reference = open_reference(options.model)
    texts = read_texts(reference, settings, Quiet())
    imatrix = imatrix_stage(reference, texts, settings, Quiet())
    table = sensitivity_stage(reference, imatrix, texts, settings, Quiet(), lambda _: None)
    names = list(quantizable(reference.header))
    # Spread over the model, and over the kinds: a plain stride may meet only one of them.
    chosen = [names[i * (len(names) - 1) // max(1, options.tensors - 1)] for i in range(options.tensors)]
    seconds = by_files(reference, imatrix.path, chosen, settings.config.n_threads)
    extrapolated = sum(seconds) / len(seconds) * len(names)
    result = {
        "tensors": len(names),
        "tokens": table.n_tokens,
        "sweep_s": round(table.probe_s, 1),
        "forward_s": round(table.forward_s, 1),
        "sweep_over_forward": round(table.probe_s / table.forward_s, 3),
        "by_files_measured_s": dict(zip(chosen, (round(s, 1) for s in seconds), strict=True)),
        "by_files_extrapolated_s": round(extrapolated, 1),
        "by_files_over_sweep": round(extrapolated / table.probe_s, 1),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
