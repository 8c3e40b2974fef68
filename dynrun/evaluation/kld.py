"""Divergence of model files from their reference on the same tokens.

Takes files and what to score, gives a :class:`Row` a file. One model is in memory at a time; what was measured before
is found again. Prints nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynrun.artifacts import StageFolder, atomic_path, sha256_file, stage_folder
from dynrun.errors import DynrunError, UsageError
from dynrun.gguf.header import Header, read_header
from dynrun.llamacpp.engine import Engine, Logits
from dynrun.metrics.intervals import Clusters, Ratio, clusters_of, paired_ratio
from dynrun.metrics.summary import Summary, perplexity, rms_delta_p, summarize
from dynrun.scoring.divergence import Divergence, divergence
from dynrun.scoring.reference import Progress, ReferenceLogits, Scored, engine_inputs, parts_key, record_reference

_COLUMNS = ("kld", "same_top", "log_p_reference", "log_p_model")


@dataclass(frozen=True)
class Row:
    """One file: ``kld`` in nats per token, ``same_top_p`` and ``rms_dp`` as fractions of 1, ``bpw`` of the whole file.

    ``clusters``: the sums of KLD per sequence, for intervals of two files' ratio.
    """

    file: Path
    size_bytes: int
    bpw: float
    kld: Summary
    same_top_p: float
    rms_dp: float
    ppl: float
    ppl_reference: float
    n_tokens: int
    clusters: Clusters

    def ratio_to(self, other: Row) -> Ratio | None:
        """This file's mean KLD over ``other``'s, on the same sequences; None where the other's is zero."""
        return paired_ratio(self.clusters, other.clusters)

    def to_json(self) -> dict[str, Any]:
        """The row as `dynrun eval kld --json` prints it. ``flips`` needs answers to questions: not measured here."""
        return {
            "file": str(self.file),
            "size_bytes": self.size_bytes,
            "bpw": self.bpw,
            "kld": {**asdict(self.kld), "ci95": list(self.kld.ci95)},
            "same_top_p": self.same_top_p,
            "flips": None,
            "rms_dp": self.rms_dp,
            "ppl": self.ppl,
            "ppl_reference": self.ppl_reference,
            "tokens": self.n_tokens,
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
    # Everything that can be wrong is found before the first minute is spent.
    headers = _checked(reference, files)
    folders = [_folder(reference, file, parts) for file in files]
    for file, folder in zip(files, folders, strict=True):
        if folder.complete:
            continue
        recorded = record_reference(reference, parts, n_threads=n_threads, n_gpu_layers=n_gpu_layers, progress=progress)
        n_ctx = max(len(part.tokens) for part in parts)
        with folder.locked(), Engine.open(file, n_ctx=n_ctx, n_threads=n_threads, n_gpu_layers=n_gpu_layers) as engine:
            _measure(recorded, engine, folder, progress)
    return [
        _row(file, header, _read(folder, len(parts)))
        for file, header, folder in zip(files, headers, folders, strict=True)
    ]


def is_measured(reference: Path, file: Path, parts: Sequence[Scored]) -> bool:
    """Whether :func:`evaluate` would find ``file``'s row."""
    return _folder(reference, file, parts).complete


def _checked(reference: Path, files: Sequence[Path]) -> list[Header]:
    """Headers of ``files``, all with the reference's vocabulary."""
    vocabulary = read_header(reference).metadata.get("tokenizer.ggml.tokens")
    headers = [read_header(file) for file in files]
    for file, header in zip(files, headers, strict=True):
        if header.metadata.get("tokenizer.ggml.tokens") != vocabulary:
            raise UsageError(
                f"{file} has another vocabulary than the reference {reference}",
                fix="compare files that were made from this reference",
            )
    return headers


def _folder(reference: Path, file: Path, parts: Sequence[Scored]) -> StageFolder:
    inputs = {
        "reference": sha256_file(reference),
        "file": sha256_file(file),
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
    for i, part in enumerate(parts):
        if not _file(folder, i).is_file():
            found = _compared(recorded.logits(i), engine, part)
            with atomic_path(_file(folder, i)) as temporary, temporary.open("wb") as stream:
                np.savez(stream, **{name: getattr(found, name) for name in _COLUMNS})
        done += len(part.tokens)
        progress(done, total, engine.path.name)
    folder.commit({"tokens": sum(len(part.outputs) for part in parts)}, elapsed_s=time.monotonic() - started)


def _compared(reference: Logits, engine: Engine, part: Scored) -> Divergence:
    following = np.array([part.tokens[position + 1] for position in part.outputs], dtype=np.int64)
    found = divergence(reference, engine.logits(part.tokens, part.outputs), following)
    if not np.isfinite(found.kld).all():
        raise DynrunError(f"{engine.path} gives logits that are not finite on {part.id}", fix="the file is damaged")
    return found


def _file(folder: StageFolder, i: int) -> Path:
    return folder / f"{i:05d}.npz"


def _read(folder: StageFolder, n_parts: int) -> list[Divergence]:
    found = []
    for i in range(n_parts):
        with np.load(_file(folder, i)) as arrays:
            found.append(Divergence(**{name: arrays[name] for name in _COLUMNS}))
    return found


def _row(file: Path, header: Header, found: Sequence[Divergence]) -> Row:
    same_top, log_p_reference, log_p_model = (
        np.concatenate([getattr(one, name) for one in found]) for name in _COLUMNS[1:]
    )
    klds = [one.kld for one in found]
    return Row(
        file=file,
        size_bytes=header.file_bytes,
        bpw=header.bpw,
        kld=summarize(klds),
        same_top_p=float(same_top.mean()),
        rms_dp=rms_delta_p(log_p_reference, log_p_model),
        ppl=perplexity(log_p_model),
        ppl_reference=perplexity(log_p_reference),
        n_tokens=len(same_top),
        clusters=clusters_of(klds),
    )
