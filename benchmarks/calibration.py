"""What the calibration text is worth: the same scheme with imatrices from several texts, on texts from other domains.

usage: .venv/bin/python benchmarks/calibration.py MODEL SCHEME --mixture NAME=MIXTURE ... --text NAME=FILE ...
       [--tokens 65536] [--eval-tokens 16384]

For each mixture (as `--calibration` takes it) an imatrix of --tokens tokens and a file by the one scheme; for each text
the mean KLD of all files on the same tokens, cut and scored as llama-perplexity does. Ratios are to the first mixture,
with the paired 95% interval. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynrun.calibration.stage import ImatrixSettings
from dynrun.config import load_config
from dynrun.evaluation.kld import Row, evaluate
from dynrun.evaluation.texts import read_text, text_parts
from dynrun.gguf.quantizable import quantizable
from dynrun.llamacpp.vocabulary import Vocabulary
from dynrun.models import Reference, open_reference
from dynrun.quantize import make_from_scheme
from dynrun.scheme import read_scheme
from dynrun.stages import Settings, imatrix_stage, read_texts

N_CTX = 512


class Narrator:
    """Stages and notes on stderr."""

    def stage(self, name: str, detail: str) -> None:
        print(f"{name}: {detail}", file=sys.stderr, flush=True)

    def progress(self, done: float, total: float, note: str = "") -> None:
        if done >= total:
            print(f"  {done:,.0f} {note}", file=sys.stderr, flush=True)


def file_of(reference: Reference, scheme: Path, mixture: str, n_tokens: int) -> Path:
    """The scheme's file with an imatrix from ``mixture``."""
    settings = Settings(calibration=mixture, imatrix=ImatrixSettings(n_tokens, N_CTX), config=load_config())
    texts = read_texts(reference, settings, Narrator())
    imatrix = imatrix_stage(reference, texts, settings, Narrator())
    print(f"  {imatrix.n_tokens:,} tokens, {imatrix.tokens_per_second} tokens/s", file=sys.stderr, flush=True)
    types = replace(read_scheme(scheme, quantizable(reference.header)), calibration=imatrix.dataset)
    made = make_from_scheme(reference, types, imatrix, n_threads=settings.config.n_threads, on_tensor=lambda *_: None)
    return made.path


def rows_on(reference: Reference, files: list[Path], text: Path, n_tokens: int) -> list[Row]:
    """A row a file on one text."""
    config = load_config()
    with Vocabulary.load(reference.path) as vocabulary:
        parts = text_parts(vocabulary, read_text(text), max_tokens=n_tokens, n_ctx=N_CTX)
    return evaluate(
        reference.path,
        files,
        parts,
        n_threads=config.n_threads,
        n_gpu_layers=config.n_gpu_layers,
        progress=Narrator().progress,
    )


def _named(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def _cell(row: Row, first: Row) -> dict[str, Any]:
    ratio = row.ratio_to(first)
    assert ratio is not None
    return {"kld": row.kld.mean, "ci95": list(row.kld.ci95), "ratio": ratio.value, "ratio_ci95": list(ratio.ci95)}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("scheme", type=Path)
    parser.add_argument("--mixture", action="append", type=_named, required=True)
    parser.add_argument("--text", action="append", type=_named, required=True)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--eval-tokens", type=int, default=16384)
    options = parser.parse_args()
    reference = open_reference(options.model)
    mixtures = dict(options.mixture)
    files = [file_of(reference, options.scheme, mixture, options.tokens) for mixture in mixtures.values()]
    table: dict[str, dict[str, Any]] = {name: {} for name in mixtures}
    for text, path in options.text:
        rows = rows_on(reference, files, Path(path), options.eval_tokens)
        for name, row in zip(mixtures, rows, strict=True):
            table[name][text] = _cell(row, rows[0])
    for cells in table.values():
        cells["geometric_mean_ratio"] = math.exp(sum(math.log(c["ratio"]) for c in cells.values()) / len(cells))
    print(json.dumps({"model": options.model, "tokens": options.tokens, "rows": table}, indent=1))


if __name__ == "__main__":
    main()
