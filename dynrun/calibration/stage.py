"""The statistics stage: from a reference and conversations to an imatrix on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrun.artifacts import Outcome, StageFolder, run_stage, sha256_file, stage_folder
from dynrun.calibration.dataset import Dataset, builtin
from dynrun.calibration.imatrix import collect, write_imatrix
from dynrun.calibration.sequences import sequences
from dynrun.config import Config
from dynrun.errors import UsageError
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.engine import Engine
from dynrun.models import Reference

IMATRIX_FILE = "imatrix.gguf"
# Counts up when the rendering, the split or the collection gives other numbers.
_REVISION = 1
Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class ImatrixSettings:
    """``n_tokens`` of calibration text in sequences of at most ``n_ctx``."""

    n_tokens: int = 32768
    n_ctx: int = 512


@dataclass(frozen=True)
class ImatrixStage:
    """An imatrix: its file, hash, and how it was made."""

    path: Path
    sha256: str
    dataset: str
    n_tokens: int
    n_sequences: int
    template: str
    outcome: Outcome


def dataset_named(name: str) -> Dataset:
    """The calibration set of that name. Raises UsageError for one that is not known."""
    if name == "builtin":
        return builtin()
    raise UsageError(f"no calibration set {name!r}", fix="the one there is now: builtin")


def imatrix_folder(reference: Reference, dataset: Dataset, settings: ImatrixSettings) -> StageFolder:
    """Where the imatrix for these inputs lies, made or not."""
    inputs = {
        "reference": reference.sha256,
        "dataset": dataset.sha256,
        "n_tokens": settings.n_tokens,
        "n_ctx": settings.n_ctx,
        "revision": _REVISION,
        "llama_cpp": installation().commit,
    }
    return stage_folder("imatrix", inputs)


def make_imatrix(
    reference: Reference, dataset: Dataset, settings: ImatrixSettings, *, config: Config, progress: Progress
) -> ImatrixStage:
    """Collect the imatrix on the calibration split, or find it."""

    def work(folder: StageFolder) -> Mapping[str, Any]:
        with Engine.open(
            reference.path, n_ctx=settings.n_ctx, n_threads=config.n_threads, n_gpu_layers=config.n_gpu_layers
        ) as engine:
            parts = sequences(engine, dataset, "calibration", max_tokens=settings.n_tokens, n_ctx=settings.n_ctx)
            total = sum(len(part.tokens) for part in parts)
            imatrix = collect(engine, [part.tokens for part in parts], lambda done: progress(done, total, "tokens"))
            template = "chat" if "tokenizer.chat_template" in engine.header.metadata else "plain"
        path = folder / IMATRIX_FILE
        write_imatrix(imatrix, path, dataset=dataset.name, chunk_count=len(parts), chunk_size=settings.n_ctx)
        return {"n_tokens": total, "n_sequences": len(parts), "template": template}

    folder = imatrix_folder(reference, dataset, settings)
    outcome = run_stage(folder, work)
    path = folder / IMATRIX_FILE
    return ImatrixStage(path, sha256_file(path), dataset.name, **outcome.result, outcome=outcome)
