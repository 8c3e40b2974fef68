"""What could be added to error feedback, tried on whole models: each variant beside the product's rounding.

usage: .venv/bin/python benchmarks/feedback_variants.py MODEL --text NAME=FILE ... [--types Q2_K,Q3_K_M]
       [--tokens 16384] [--eval-tokens 2048] [--variants sequential,drift,half-drift,tokens,scales,norms]

All weights of MODEL are rounded into the types of a stock preset and put in the loaded model (no file is made, so no
kernel's rounding of activations is in the figures); mean KLD on each text and, over the product's, as a ratio.

    feedback     the product's rounding: the covariance of the full-precision model's inputs
    sequential   the covariance of the inputs that the rounded model has, all weights before rounded too
    drift        that, and W·C·H⁻¹ in the place of W, C = Σ x·x̂ᵀ of both models' inputs: aims at the full-precision
                 output given the rounded model's input (as GPTAQ, arXiv 2504.02692)
    half-drift   the mean of W and W·C·H⁻¹
    tokens       tokens weighted by the divergence that the rounded model has at them, between 1/4 and 4
    scales       after the sweep: block scales d (and dmin) refitted under H one after another, then one more sweep
    resweep      one more sweep alone, what `scales` has to be compared with
    norms        the gains of the norms before q, k, v, gate, up and output refitted to the rounded weights under H
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from quality_bench import Narrator, log, named
from quality_ratios import geometric_mean
from variant_rounding import Means, Overlaid, refitted, resweep, summed

from dynrun.calibration.covariance import Covariance
from dynrun.calibration.imatrix import Imatrix, read_imatrix
from dynrun.calibration.sequences import pack
from dynrun.calibration.stage import ImatrixStage
from dynrun.config import load_config
from dynrun.evaluation.texts import read_text, text_parts
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.gguf.weights import WeightFile, encode
from dynrun.llamacpp.engine import Engine
from dynrun.models import Reference, open_reference
from dynrun.quantize import stock_preset
from dynrun.rounding.choice import strength_of
from dynrun.rounding.feedback import Rounder
from dynrun.rounding.settings import FeedbackSettings
from dynrun.rounding.source import Source
from dynrun.scoring.divergence import divergence
from dynrun.scoring.reference import Scored
from dynrun.sensitivity.in_place import stored_as
from dynrun.stages import Settings, imatrix_stage, read_texts

Rows = npt.NDArray[np.float32]
Values = Mapping[str, Rows]
VARIANTS = ("sequential", "drift", "half-drift", "tokens", "resweep", "scales", "norms")
N_CTX = 512


@dataclass
class Trial:
    """One model with the types of one preset; ``parts`` by text, ``batches`` of calibration tokens."""

    reference: Reference
    imatrix: ImatrixStage
    engine: Engine
    original: Engine
    parts: Mapping[str, Sequence[Scored]]
    batches: Sequence[Sequence[Sequence[int]]]
    wanted: Mapping[str, list[Rows]]
    statistics: Means
    n_threads: int
    types: Mapping[str, str] = field(default_factory=dict)
    strengths: dict[str, float] = field(default_factory=dict)

    def source(self, means: Means, rows: Values | None = None) -> Source:
        """What feedback reads: these statistics, and these rows in the place of the model's."""
        return Source(
            Overlaid(self.reference.path, rows or {}), self.entries, cast("Covariance", means), FeedbackSettings()
        )

    def of(self, preset: str) -> Trial:
        """With the types of a stock preset."""
        given = stock_preset(self.reference, preset, self.imatrix).types
        known = {name for name in quantizable(self.reference.header) if name in self.original.input_of}
        return replace(self, types={name: given[name] for name in known})

    @cached_property
    def entries(self) -> Imatrix:
        return read_imatrix(self.imatrix.path)

    @cached_property
    def rounder(self) -> Rounder:
        return Rounder(self.n_threads)

    def rounded(self, source: Source, after: Callable[..., tuple[Any, Rows]] | None = None) -> dict[str, Rows]:
        """The values of all tensors, rounded with feedback; ``after`` may go on with a tensor's bytes."""
        found = {}
        for name, type_name in sorted(self.types.items(), key=lambda item: source.covariance.input_of[item[0]]):
            factor = source.factor(name, 0, self._strength(source, name), TENSOR_TYPES[type_name].block_size)
            rows, importance = source.rows(name, 0), source.importance(name, 0)
            data, values = self.rounder.round(rows, factor, type_name, importance, sweeps=1)
            found[name] = values if after is None else after(type_name, data, rows, factor)[1]
        return found

    def _strength(self, source: Source, name: str) -> float:
        first = source.covariance.input_of[name]
        if first not in self.strengths:
            self.strengths[first] = strength_of(source, self.rounder, first)
        return self.strengths[first]

    def place(self, values: Values) -> None:
        """Have ``values`` in the model, in its own type."""
        for name, rows in values.items():
            self.engine.write(name, encode(rows, stored_as(self.engine, name) or ""))

    def kld(self) -> dict[str, float]:
        """Mean KLD of the model as it is, by text."""
        found = {}
        for text, parts in self.parts.items():
            klds = [
                divergence(wanted, self.engine.logits(part.tokens, part.outputs)).kld
                for part, wanted in zip(parts, self.wanted[text], strict=True)
            ]
            found[text] = float(np.concatenate(klds).mean())
        return found

    def weights_of_tokens(self) -> list[Rows]:
        """A weight for each token of each batch: its KLD over the mean's, between 1/4 and 4."""
        klds = [
            np.concatenate([divergence(self.original.logits(one), self.engine.logits(one)).kld for one in batch])
            for batch in self.batches
        ]
        mean = float(np.concatenate(klds).mean())
        return [np.clip(kld / mean, 0.25, 4).astype(np.float32) for kld in klds]


def drifted(trial: Trial, means: Means, share: float) -> dict[str, Rows]:
    """W moved by ``share`` of the way to W·C·H⁻¹, shrunk as the factor of H is."""
    import torch

    weights, found = WeightFile(trial.reference.path), {}
    for name in trial.types:
        rows = torch.from_numpy(weights.rows(name)).double()
        h = torch.from_numpy(means.matrix(name)).double()
        # C = H + Σ (x − x̂)·x̂ᵀ: only the drift is solved for, so that damping costs nothing where there is none.
        drift = torch.from_numpy(means.drift(name)).double()
        damped = h + 0.01 * torch.diagonal(h).mean() * torch.eye(len(h), dtype=torch.float64)
        moved = rows + share * torch.linalg.solve(damped, (rows @ drift).T).T
        found[name] = moved.float().numpy()
    return found


def norm_gains(trial: Trial, values: Values) -> dict[str, Rows]:
    """New gains of the norms: least Σ tr((W − Q·diag s)·H·(W − Q·diag s)ᵀ) over the weights that read their output."""
    weights, groups = WeightFile(trial.reference.path), _readers(trial)
    found = {}
    for norm, readers in groups.items():
        h = trial.statistics.matrix(readers[0]).astype(np.float64)
        left, right = np.zeros_like(h), np.zeros(len(h))
        for name in readers:
            q, w = values[name].astype(np.float64), weights.rows(name).astype(np.float64)
            left += (q.T @ q) * h
            right += np.einsum("ij,ij->j", q, w @ h)
        mean = float(np.trace(left)) / len(left)
        # Toward gains of 1: what the text does not tell stays.
        prior = 0.01 * mean
        s = np.linalg.solve(left + prior * np.eye(len(left)), right + prior)
        found[norm] = (weights.rows(norm).reshape(-1) * s).astype(np.float32)
    return found


def _readers(trial: Trial) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    after = {"attn_q": "attn_norm", "attn_k": "attn_norm", "attn_v": "attn_norm"}
    after |= {"ffn_gate": "ffn_norm", "ffn_up": "ffn_norm"}
    for name in trial.types:
        block, _, kind = name.removesuffix(".weight").rpartition(".")
        norm = "output_norm.weight" if name == "output.weight" else f"{block}.{after.get(kind, '')}.weight"
        if norm in trial.reference.header.tensors:
            found.setdefault(norm, []).append(name)
    return found


def run(trial: Trial, variants: Sequence[str]) -> dict[str, dict[str, float]]:
    """Mean KLD by variant and text."""
    own = trial.source(trial.statistics)
    product = trial.rounded(own)
    trial.place(product)
    found = {"feedback": trial.kld()}
    log(f"  feedback: {found['feedback']}")
    moved = trial.statistics
    if {"sequential", *_DRIFTS} & {*variants}:
        moved = summed(trial.original, trial.batches, also=trial.engine)
    importance = trial.weights_of_tokens() if "tokens" in variants else None
    for variant in variants:
        norms: Values = {}
        if variant == "sequential":
            values: Values = trial.rounded(trial.source(moved))
        elif variant in _DRIFTS:
            values = trial.rounded(trial.source(moved, drifted(trial, moved, _DRIFTS[variant])))
        elif variant == "tokens":
            values = trial.rounded(trial.source(summed(trial.original, trial.batches, weights=importance)))
        elif variant in ("resweep", "scales"):
            values = trial.rounded(own, resweep if variant == "resweep" else refitted)
        else:
            values, norms = product, norm_gains(trial, product)
        trial.place({**values, **norms})
        found[variant] = trial.kld()
        log(f"  {variant}: {found[variant]}")
        trial.place({norm: WeightFile(trial.reference.path).rows(norm) for norm in norms})
    return found


_DRIFTS = {"drift": 1.0, "half-drift": 0.5}


def trial_of(options: argparse.Namespace, original: Engine, engine: Engine) -> Trial:
    """All that the presets share."""
    reference, settings = open_reference(options.model), Settings(config=load_config())
    texts = read_texts(reference, settings, Narrator())
    imatrix = imatrix_stage(reference, texts, settings, Narrator())
    parts = {
        name: text_parts(original, read_text(Path(path)), max_tokens=options.eval_tokens, n_ctx=N_CTX)
        for name, path in options.text
    }
    batches = pack(texts.pool.sequences, n_tokens=N_CTX, n_seq_max=original.n_seq_max)[: options.tokens // N_CTX]
    wanted = {name: [original.logits(part.tokens, part.outputs) for part in found] for name, found in parts.items()}
    collected, n_threads = summed(original, batches), settings.config.n_threads
    return Trial(reference, imatrix, engine, original, parts, batches, wanted, collected, n_threads)


def main() -> int:
    """Print JSON: KLD by preset, variant and text, and the geometric mean of the ratios to the product's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", action="append", type=named, required=True, metavar="NAME=FILE")
    parser.add_argument("--types", default="Q2_K,Q3_K_M")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--eval-tokens", type=int, default=2048)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    options = parser.parse_args()
    found: dict[str, Any] = {}
    settings: dict[str, Any] = {"n_ctx": N_CTX, "n_threads": load_config().n_threads, "n_seq_max": 16}
    path = open_reference(options.model).path
    # One model has its weights replaced; the other stays as it is.
    with Engine.open(path, **settings) as original, Engine.open(path, **settings) as engine:
        shared = trial_of(options, original, engine)
        for preset in options.types.split(","):
            log(preset)
            klds = run(shared.of(preset), options.variants.split(","))
            base = klds["feedback"]
            ratios = {v: geometric_mean(k[t] / base[t] for t in base) for v, k in klds.items()}
            found[preset] = {"kld": klds, "over_feedback": ratios}
            log(json.dumps(ratios))
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
