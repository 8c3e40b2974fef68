"""Divergence of model files from their reference on the same tokens.

Takes files and what to score, gives a :class:`Row` a file. One model is in memory at a time; what was measured before
is found again. Prints nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dynrun.artifacts import StageFolder, atomic_path, stage_folder
from dynrun.errors import UsageError
from dynrun.evaluation.checks import checked_headers
from dynrun.gguf.shards import read_whole_header
from dynrun.llamacpp.engine import Engine
from dynrun.llamacpp.not_finite import not_finite
from dynrun.metrics.flips import Flips
from dynrun.metrics.intervals import (
    Clusters,
    Estimate,
    Ratio,
    clusters_of,
    mean_estimate,
    paired_difference,
    paired_ratio,
)
from dynrun.metrics.summary import Summary, perplexity, rms_delta_p, summarize
from dynrun.scoring.ahead import ahead
from dynrun.scoring.divergence import Divergence, divergence, joined
from dynrun.scoring.reference import (
    Coded,
    Progress,
    ReferenceLogits,
    Scored,
    engine_inputs,
    model_sha256,
    open_for,
    parts_key,
    record_reference,
    score,
)

_COLUMNS = ("kld", "same_top", "log_p_reference", "log_p_model")


@dataclass(frozen=True)
class Score:
    """Divergence over scored tokens: ``kld`` in nats per token, ``same_top_p`` and ``rms_dp`` as fractions of 1.

    ``ln_ppl_ratio``: ln(``ppl`` / ``ppl_reference``). ``clusters``: the sums of KLD per sequence, for paired intervals.
    """

    kld: Summary
    same_top_p: Estimate
    rms_dp: float
    ppl: float
    ppl_reference: float
    ln_ppl_ratio: Estimate
    n_tokens: int
    n_sequences: int
    clusters: Clusters

    def to_json(self) -> dict[str, Any]:
        """As the commands print it."""
        return {
            "kld": {**asdict(self.kld), "ci95": list(self.kld.ci95)},
            "same_top_p": self.same_top_p.value,
            "same_top_p_ci95": list(self.same_top_p.ci95),
            "rms_dp": self.rms_dp,
            "ppl": self.ppl,
            "ppl_reference": self.ppl_reference,
            "ln_ppl_ratio": self.ln_ppl_ratio.to_json(),
            "tokens": self.n_tokens,
            "sequences": self.n_sequences,
        }


@dataclass(frozen=True)
class Domain:
    """The score on one of the texts, or on one kind of conversations."""

    name: str
    score: Score

    def to_json(self) -> dict[str, Any]:
        """As the commands print it."""
        return {"name": self.name, **self.score.to_json()}


@dataclass(frozen=True)
class Continuation:
    """Along the reference's greedy continuations, of at most ``n_tokens`` each.

    ``parted``: for each prompt the position, from 0, of the first token where the file's own greedy continuation is
    another; None where it never is. ``score``: the divergence at all these positions.
    """

    n_tokens: int
    parted: tuple[int | None, ...]
    score: Score

    @property
    def identical(self) -> float:
        """The share of prompts whose continuation is the same to its end."""
        return sum(position is None for position in self.parted) / len(self.parted)

    @property
    def median_parted(self) -> float:
        """The median position where the files part; ``n_tokens`` stands for never."""
        return float(np.median([self.n_tokens if position is None else position for position in self.parted]))

    def to_json(self) -> dict[str, Any]:
        """As the commands print it."""
        return {
            "prompts": len(self.parted),
            "max_tokens": self.n_tokens,
            "parted": list(self.parted),
            "identical": self.identical,
            "median_parted": self.median_parted,
            **self.score.to_json(),
        }


@dataclass(frozen=True)
class Row:
    """One file: its ``score`` on all texts and on each of the ``domains``; ``bpw`` of the whole file.

    ``flips``: from the reference's stored answers to this file's, by task.
    """

    file: Path
    size_bytes: int
    bpw: float
    score: Score
    domains: tuple[Domain, ...]
    continuation: Continuation | None = None
    flips: Mapping[str, Flips] = field(default_factory=dict)

    @property
    def kld(self) -> Summary:
        return self.score.kld

    @property
    def same_top_p(self) -> float:
        return self.score.same_top_p.value

    @property
    def rms_dp(self) -> float:
        return self.score.rms_dp

    @property
    def ppl(self) -> float:
        return self.score.ppl

    @property
    def ppl_reference(self) -> float:
        return self.score.ppl_reference

    @property
    def n_tokens(self) -> int:
        return self.score.n_tokens

    @property
    def clusters(self) -> Clusters:
        return self.score.clusters

    def ratio_to(self, other: Row) -> Ratio | None:
        """This file's mean KLD over ``other``'s, on the same sequences; None where the other's is zero."""
        return paired_ratio(self.clusters, other.clusters)

    def difference_to(self, other: Row) -> Estimate:
        """This file's mean KLD less ``other``'s, on the same sequences."""
        return paired_difference(self.clusters, other.clusters)

    def to_json(self) -> dict[str, Any]:
        """The row as `dynrun eval kld --json` prints it."""
        return {
            "file": str(self.file),
            "size_bytes": self.size_bytes,
            "bpw": self.bpw,
            **self.score.to_json(),
            "flips": {task: changed.to_json() for task, changed in self.flips.items()} or None,
            "domains": [domain.to_json() for domain in self.domains],
            "continuation": self.continuation and self.continuation.to_json(),
        }


def evaluate(
    reference: Path,
    files: Sequence[Path],
    parts: Sequence[Scored],
    *,
    n_threads: int,
    n_gpu_layers: int = -1,
    progress: Progress = lambda *_: None,
) -> list[Row]:
    """Measure ``files`` against ``reference`` on ``parts``, in that order; every scored position has a successor.

    ``progress`` gets tokens done, tokens in all (of this model), and which model. Raises UsageError for a file with
    another vocabulary than the reference, DynrunError for one whose logits are not finite.
    """
    found = measure(reference, files, parts, n_threads=n_threads, n_gpu_layers=n_gpu_layers, progress=progress)
    return [_row(file, parts, divergences) for file, divergences in zip(files, found, strict=True)]


def measure(
    reference: Path,
    files: Sequence[Path],
    parts: Sequence[Scored],
    *,
    n_threads: int,
    n_gpu_layers: int = -1,
    progress: Progress = lambda *_: None,
) -> list[list[Divergence]]:
    """For each file its divergence on each of ``parts``: measured, or found. Raises what :func:`evaluate` does."""
    # Everything that can be wrong is found before the first minute is spent.
    checked_headers(reference, files)
    folders = [_folder(reference, file, parts) for file in files]
    for file, folder in zip(files, folders, strict=True):
        if folder.complete:
            continue
        recorded = record_reference(reference, parts, n_threads=n_threads, n_gpu_layers=n_gpu_layers, progress=progress)
        with folder.locked(), open_for(file, parts, n_threads=n_threads, n_gpu_layers=n_gpu_layers) as engine:
            _measure(recorded, engine, folder, progress)
    return [_read(folder, len(parts)) for folder in folders]


def is_measured(reference: Path, file: Path, parts: Sequence[Scored]) -> bool:
    """Whether :func:`evaluate` would find ``file``'s row."""
    return _folder(reference, file, parts).complete


def _folder(reference: Path, file: Path, parts: Sequence[Scored]) -> StageFolder:
    inputs = {
        "reference": model_sha256(reference),
        "file": model_sha256(file),
        "parts": parts_key(parts),
        **engine_inputs(),
    }
    return stage_folder("kld", inputs)


def _measure(recorded: ReferenceLogits, engine: Engine, folder: StageFolder, progress: Progress) -> None:
    """Write the divergence on each sequence that ``folder`` lacks."""
    started, parts = time.monotonic(), recorded.parts
    total, done = sum(len(part.tokens) for part in parts), 0
    if engine.n_vocab != recorded.n_vocab:
        raise UsageError(f"{engine.path} has {engine.n_vocab} tokens, its reference {recorded.n_vocab}")
    missing = dict.fromkeys(i for i in range(len(parts)) if not _file(folder, i).is_file())
    with closing(ahead(_compared(recorded.coded(i), engine, parts[i]) for i in missing)) as coming:
        for i, part in enumerate(parts):
            if i in missing:
                found = next(coming)
                with atomic_path(_file(folder, i)) as temporary, temporary.open("wb") as stream:
                    np.savez(stream, **{name: getattr(found, name) for name in _COLUMNS})
            done += len(part.tokens)
            progress(done, total, engine.path.name)
    folder.commit({"tokens": sum(len(part.outputs) for part in parts)}, elapsed_s=time.monotonic() - started)


def _compared(reference: Coded, engine: Engine, part: Scored) -> Divergence:
    following = np.array([part.tokens[position + 1] for position in part.outputs], dtype=np.int64)
    found, done = [], 0
    for block in score(engine, part):
        rows = slice(done, done + len(block))
        found.append(divergence(reference[rows], block, following[rows]))
        done += len(block)
    whole = joined(found)
    if not np.isfinite(whole.kld).all():
        raise not_finite(engine, engine.path, part.tokens, part.name)
    return whole


def _file(folder: StageFolder, i: int) -> Path:
    return folder / f"{i:05d}.npz"


def _read(folder: StageFolder, n_parts: int) -> list[Divergence]:
    found = []
    for i in range(n_parts):
        with np.load(_file(folder, i)) as arrays:
            found.append(Divergence(**{name: arrays[name] for name in _COLUMNS}))
    return found


def _row(file: Path, parts: Sequence[Scored], found: Sequence[Divergence]) -> Row:
    header = read_whole_header(file)
    groups: dict[str, list[Divergence]] = {}
    for part, one in zip(parts, found, strict=True):
        groups.setdefault(part.domain, []).append(one)
    domains = tuple(Domain(name, score_of(members)) for name, members in groups.items())
    score = domains[0].score if len(domains) == 1 else score_of(found)
    return Row(file, header.file_bytes, header.bpw, score, domains)


def score_of(found: Sequence[Divergence]) -> Score:
    """The score over sequences, one :class:`Divergence` each. Raises ValueError where nothing was scored."""
    same_top, log_p_reference, log_p_model = (
        np.concatenate([getattr(one, name) for one in found]) for name in _COLUMNS[1:]
    )
    klds = [one.kld for one in found]
    return Score(
        kld=summarize(klds),
        same_top_p=mean_estimate([one.same_top.astype(np.float64) for one in found]),
        rms_dp=rms_delta_p(log_p_reference, log_p_model),
        ppl=perplexity(log_p_model),
        ppl_reference=perplexity(log_p_reference),
        ln_ppl_ratio=mean_estimate([one.log_p_reference - one.log_p_model for one in found]),
        n_tokens=len(same_top),
        n_sequences=len(found),
        clusters=clusters_of(klds),
    )
