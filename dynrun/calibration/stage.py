"""The statistics stage: from a reference and token sequences to an imatrix on disk, and the covariance when asked.

Takes sequences (text.py), gives files found again by them; chooses no text.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from dynrun.artifacts import Outcome, StageFolder, run_stage, sha256_file, stage_folder
from dynrun.calibration.collect import Batch, Checkpoint, Pass, SquareSums, inputs_of, run_pass
from dynrun.calibration.covariance import Covariance, CovarianceSums, Unit, is_written, one_bytes, plan_passes
from dynrun.calibration.experts import coverage, shrink_experts
from dynrun.calibration.imatrix import load_imatrix, merge, missing_entries, read_imatrix, write_imatrix
from dynrun.calibration.relay import Relay, relays
from dynrun.calibration.sequences import TokenSequence, fingerprint, pack
from dynrun.config import Config
from dynrun.errors import NotFoundError
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.engine import Engine
from dynrun.models import Reference

IMATRIX_FILE = "imatrix.gguf"
_STATE_FILE = "state.npz"
_RELAY_FOLDER = "layers"
# Counts up when the packing or the collection gives other numbers.
_REVISION = 3
_COVARIANCE_REVISION = 1
# Sequences that share a batch: recurrent models keep a state for each.
_N_SEQ_MAX = 16
_BATCH_TOKENS = 512
# With the gigabyte that torch, and llama.cpp beside the weights, take of their own, less than 4 GB.
_COVARIANCE_MEMORY = 25 * 10**8
Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class ImatrixSettings:
    """``n_tokens`` of calibration text in sequences of at most ``n_ctx``.

    With experts, text goes on to ``cap`` tokens until each expert has seen ``min_expert_tokens``; each gets as many of
    its layer's mean beside them. ``checkpoint_s``: seconds between checkpoints; ``memory``: bytes for the
    covariance, then for the factors made of it (None: as usual). Neither changes a result.
    """

    n_tokens: int = 32768
    n_ctx: int = 512
    min_expert_tokens: int = 256
    max_tokens: int | None = None
    memory: int | None = None
    checkpoint_s: float = 30.0

    @property
    def cap(self) -> int:
        """Most tokens that are drawn for experts that are short of them; four times ``n_tokens`` where not set."""
        return max(self.n_tokens, self.max_tokens if self.max_tokens is not None else 4 * self.n_tokens)


@dataclass(frozen=True)
class ImatrixStage:
    """An imatrix: its file, hash, and how it was made.

    ``dataset`` is what the file says of its text; ``template`` where the chat template came from; ``missing`` weights
    without an entry; ``mtp_missing`` why MTP blocks are among them; ``short`` experts of all saw too few tokens.
    """

    path: Path
    sha256: str
    dataset: str
    n_tokens: int
    n_sequences: int
    template: str
    missing: tuple[str, ...]
    n_experts: int
    short_experts: int
    least_expert_tokens: int
    tokens_per_second: float
    outcome: Outcome
    mtp_missing: str = ""


@dataclass(frozen=True)
class CovarianceStage:
    """The matrices, their content address, the number of passes over the text, and tokens per second of the first."""

    covariance: Covariance
    key: str
    n_ctx: int
    n_passes: int
    tokens_per_second: float
    outcome: Outcome


@dataclass(frozen=True)
class Job:
    """What statistics are collected of, on what, and how; ``dataset`` and ``template`` are names for the record."""

    reference: Reference
    sequences: Sequence[TokenSequence]
    settings: ImatrixSettings
    dataset: str
    template: str
    config: Config = field(default_factory=Config)
    progress: Progress = lambda *_: None

    def folder(self, stage: str) -> StageFolder:
        """Where the result of a stage lies, made or not."""
        own = {"covariance": _COVARIANCE_REVISION} if stage == "covariance" else {}
        return stage_folder(stage, {**self._inputs, **own})

    @cached_property
    def _inputs(self) -> dict[str, Any]:
        # Once: hashing all tokens takes its time, and every pass of a covariance asks for a folder.
        return {
            "reference": self.reference.sha256,
            "sequences": fingerprint(self.sequences),
            "n_tokens": self.settings.n_tokens,
            "n_ctx": self.settings.n_ctx,
            "min_expert_tokens": self.settings.min_expert_tokens,
            "revision": _REVISION,
            "llama_cpp": installation().commit,
        }

    @cached_property
    def base(self) -> list[Batch]:
        """The batches that every run decodes."""
        return pack(self.sequences[: self._n_base], n_tokens=self._batch_tokens, n_seq_max=_N_SEQ_MAX)

    @cached_property
    def batches(self) -> list[Batch]:
        """All batches: after the base those for experts that are still short."""
        more = pack(self.sequences[self._n_base :], n_tokens=self._batch_tokens, n_seq_max=_N_SEQ_MAX)
        return self.base + more

    @property
    def _n_base(self) -> int:
        totals = accumulate(len(one.tokens) for one in self.sequences)
        return sum(total <= self.settings.n_tokens for total in totals)

    @property
    def _batch_tokens(self) -> int:
        return max(self.settings.n_ctx, _BATCH_TOKENS)

    def engine(self) -> Engine:
        """The reference, loaded."""
        return Engine.open(
            self.reference.path,
            n_ctx=self._batch_tokens,
            n_threads=self.config.n_threads,
            n_gpu_layers=self.config.n_gpu_layers,
            n_seq_max=_N_SEQ_MAX,
            mtp=True,
        )

    def told(self, note: str) -> Callable[[int], None]:
        """Progress in tokens; what goes beyond the base is for the experts."""
        total = sum(len(tokens) for batch in self.base for tokens in batch)
        return lambda n: self.progress(n, max(n, total), note if n <= total else f"{note}, more for rare experts")


def make_imatrix(job: Job) -> ImatrixStage:
    """Collect the imatrix, or find it. Raises DynrunError where activations are not finite."""

    def work(folder: StageFolder) -> Mapping[str, Any]:
        with job.engine() as engine:
            sums = SquareSums(inputs_of(engine))
            state = Checkpoint(folder / _STATE_FILE, job.settings.checkpoint_s)
            done = run_pass(engine, job.batches, [sums], state, enough=_enough(job, sums), progress=job.told("tokens"))
            result = _write(job, engine, sums, done, folder)
        (folder / _STATE_FILE).unlink(missing_ok=True)
        return result

    folder = job.folder("imatrix")
    return _imatrix_stage(folder, job.reference, job.settings.min_expert_tokens, run_stage(folder, work))


def make_covariance(job: Job) -> CovarianceStage:
    """Σxxᵀ of every input, or find it; the imatrix too, from the same pass, where it is not there yet.

    ``settings.memory`` bounds what is summed at once: more passes where not all fits. Raises DoesNotFitError
    where one matrix is larger than that; without it one always fits.
    """

    def work(folder: StageFolder) -> Mapping[str, Any]:
        with job.engine() as engine:
            widths = {name: (engine.weights[name].shape[0], n) for name, n in inputs_of(engine).items()}
            least = max(one_bytes(n) for n, _ in widths.values())
            passes = plan_passes(widths, job.settings.memory or max(_COVARIANCE_MEMORY, least))
            chain = relays(engine, passes, job.batches[0], folder / _RELAY_FOLDER)
            speeds = [_covariance_pass(job, engine, *one, folder) for one in zip(passes, chain, strict=True)]
            input_of = dict(engine.input_of)
        shutil.rmtree(folder / _RELAY_FOLDER, ignore_errors=True)
        return {"input_of": input_of, "n_passes": len(passes), "tokens_per_second": round(speeds[0], 1)}

    folder = job.folder("covariance")
    outcome = run_stage(folder, work)
    result = outcome.result
    covariance = Covariance(folder.path, result["input_of"])
    return CovarianceStage(
        covariance, folder.key, job.settings.n_ctx, result["n_passes"], result["tokens_per_second"], outcome
    )


def _covariance_pass(job: Job, engine: Engine, units: Sequence[Unit], relay: Relay, folder: StageFolder) -> float:
    """One pass, unless an earlier run has done it; its tokens per second."""
    if all(is_written(unit, folder.path) for unit in units):
        return 0.0
    sums, imatrix = CovarianceSums(units), job.folder("imatrix")
    squares = None if imatrix.complete else SquareSums(inputs_of(engine))
    # The same text for all: as much as the experts needed.
    batches = job.batches[: imatrix.manifest()["result"]["n_batches"]] if squares is None else job.batches
    state = Checkpoint(folder / _STATE_FILE, job.settings.checkpoint_s)
    done = run_pass(
        engine,
        batches,
        [sums] if squares is None else [sums, squares],
        state,
        enough=_enough(job, squares),
        progress=job.told(f"tokens, {len(units)} matrices"),
        relay=relay,
    )
    if squares is not None:
        run_stage(imatrix, lambda to: _write(job, engine, squares, done, to))
    sums.write(folder.path)
    relay.end()
    state.path.unlink(missing_ok=True)
    return done.tokens_per_second


def _enough(job: Job, sums: SquareSums | None) -> Callable[[int], bool]:
    """Whether so many batches are enough: the base, and each expert has seen its tokens."""
    if sums is None:
        return lambda _: False
    return lambda n: n >= len(job.base) and sums.least_expert_tokens() >= job.settings.min_expert_tokens


def _write(job: Job, engine: Engine, sums: SquareSums, done: Pass, folder: StageFolder) -> Mapping[str, Any]:
    sums.check(engine.path)
    raw = sums.imatrix(engine.input_of)
    n_sequences = sum(len(batch) for batch in job.batches[: done.n_batches])
    write_imatrix(
        shrink_experts(raw, job.settings.min_expert_tokens),
        folder / IMATRIX_FILE,
        dataset=job.dataset,
        chunk_count=n_sequences,
        chunk_size=job.settings.n_ctx,
    )
    return {
        "n_tokens": done.n_tokens,
        "n_batches": done.n_batches,
        "n_sequences": n_sequences,
        "tokens_per_second": round(done.tokens_per_second, 1),
        "dataset": job.dataset,
        "template": job.template,
        "mtp_missing": engine.mtp_missing,
    }


def import_imatrix(reference: Reference, paths: Sequence[Path], *, min_expert_tokens: int) -> ImatrixStage:
    """Imatrices of somebody else's (GGUF or legacy ``.dat``) for ``reference``, merged, as a stage like our own.

    Experts get their layer's mean in it too. Raises UsageError where one was made for another model.
    """

    def work(folder: StageFolder) -> Mapping[str, Any]:
        shapes = {name: tensor.shape for name, tensor in reference.header.tensors.items()}
        loaded = [load_imatrix(path, shapes) for path in paths]
        imatrix = loaded[0] if len(loaded) == 1 else merge(loaded)
        # Of whoever made the file, perhaps with their folders.
        dataset = ",".join(dict.fromkeys(Path(name).name for name in imatrix.datasets)) or "unknown"
        shrunk = imatrix if imatrix.estimated else shrink_experts(imatrix, min_expert_tokens)
        write_imatrix(shrunk, folder / IMATRIX_FILE, dataset=dataset)
        return {
            "n_tokens": imatrix.chunk_count * imatrix.chunk_size,
            "n_batches": 0,
            "n_sequences": imatrix.chunk_count,
            "tokens_per_second": 0.0,
            "dataset": dataset,
            "template": f"imported from {', '.join(path.name for path in paths)}",
        }

    for path in paths:
        if not path.is_file():
            raise NotFoundError(f"the imatrix {path} does not exist", fix="check the path")
    files = [sha256_file(path) for path in paths]
    inputs = {"reference": reference.sha256, "files": files, "min_expert_tokens": min_expert_tokens}
    folder = stage_folder("imatrix", {**inputs, "revision": _REVISION})
    return _imatrix_stage(folder, reference, min_expert_tokens, run_stage(folder, work))


def _imatrix_stage(folder: StageFolder, reference: Reference, min_expert_tokens: int, outcome: Outcome) -> ImatrixStage:
    path = folder / IMATRIX_FILE
    imatrix = read_imatrix(path)
    experts = coverage(imatrix, min_tokens=min_expert_tokens)
    result = {key: value for key, value in outcome.result.items() if key != "n_batches"}
    return ImatrixStage(
        path=path,
        sha256=sha256_file(path),
        missing=tuple(missing_entries(imatrix, reference.header)),
        n_experts=sum(group.n_expert for group in experts),
        short_experts=sum(group.short for group in experts),
        least_expert_tokens=min((group.least for group in experts), default=0),
        outcome=outcome,
        **result,
    )
