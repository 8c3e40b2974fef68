"""The reference's logits on disk, so that only one model is in memory at a time.

Takes a GGUF and token sequences, gives their logits back one sequence at a time. A file per sequence, each written
atomically: an interrupted pass goes on. Compares nothing.

Codes: with m the row's maximum and r its range (at most 40 nats, the tail below is clamped there),

    c = round(65535·√((m − z)/r))    z ≈ m − r·(c/65535)²

as uint16, after m and r as float32: 2·n_vocab + 8 bytes a token, as in llama-perplexity's base file. The square root
puts the steps where the probability is: 2e-4 nats at most in the top nat, far smaller near the maximum, so the most
probable token stays the most probable. Mean KLDs move by less than 1e-6.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynrun.artifacts import MANIFEST, StageFolder, atomic_path, key_of, sha256_bytes, sha256_file, stage_folder
from dynrun.errors import MALFORMED, DoesNotFitError, DynrunError
from dynrun.gguf.header import read_header
from dynrun.gguf.shards import read_shards
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.engine import Engine, Logits
from dynrun.llamacpp.not_finite import not_finite
from dynrun.scoring.ahead import ahead
from dynrun.scoring.divergence import each_tile

Codes = npt.NDArray[np.uint16]
Progress = Callable[[int, int, str], None]

_RANGE_NATS = 40.0
_TOP_CODE = 65535
# uint16 cells that the two float32 of a row take.
_HEAD = 4
# Counts up when the codes change.
_FORMAT = 2
# How a recording may differ from the one that is wanted, in words; by the key of its inputs.
_OTHER = {
    "parts": "another text or other positions",
    "format": "format {}",
    "llama_cpp": "llama.cpp {:.7}",
    "backend": "backend {}",
}
# Logits in float32 that a decode may give, here and in llama.cpp: bounds the memory for large vocabularies.
_DECODE_BYTES = 1 << 28


@dataclass(frozen=True)
class Scored:
    """A token sequence and the positions in it whose predictions are compared; ``domain``: the text it belongs to."""

    id: str
    tokens: tuple[int, ...]
    outputs: tuple[int, ...]
    domain: str = ""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.domain} {self.id}".strip()


def parts_key(parts: Sequence[Scored]) -> str:
    """Content address of what is scored."""
    return key_of({"parts": [[part.id, list(part.tokens), list(part.outputs)] for part in parts]})


def encode_logits(logits: Logits) -> Codes:
    """Logits [n, n_vocab] as codes [n, 4 + n_vocab]. Raises ValueError for NaN or +∞; −∞ is clamped as the tail is."""
    codes = np.empty((len(logits), _HEAD + logits.shape[1]), dtype=np.uint16)
    each_tile(lambda rows: _encode(logits[rows], codes[rows]), *logits.shape)
    return codes


def _encode(logits: Logits, codes: Codes) -> None:
    top = logits.max(axis=1, keepdims=True)
    if not np.isfinite(top).all():
        raise ValueError("logits that are not finite")
    spread = np.clip(top - logits.min(axis=1, keepdims=True), np.float32(1e-6), np.float32(_RANGE_NATS))
    below = np.subtract(top, logits)
    np.divide(below, spread, out=below)
    np.minimum(below, 1, out=below)
    np.sqrt(below, out=below)
    below *= _TOP_CODE
    np.rint(below, out=below)
    codes[:, :_HEAD] = np.concatenate([top, spread], axis=1).view(np.uint16)
    codes[:, _HEAD:] = below


def decode_logits(codes: Codes) -> Logits:
    """Logits [n, n_vocab] of :func:`encode_logits`."""
    return _decode_below(codes) + _heads(codes)[:, :1]


def _decode_below(codes: Codes) -> Logits:
    """The logits less each row's maximum, which is exactly 0."""
    logits = codes[:, _HEAD:].astype(np.float32)
    np.square(logits, out=logits)
    logits *= _heads(codes)[:, 1:] / np.float32(-(_TOP_CODE**2))
    return logits


def _heads(codes: Codes) -> Logits:
    """Maximum and range of each row, [n, 2]."""
    return np.ascontiguousarray(codes[:, :_HEAD]).view(np.float32)


@dataclass(frozen=True)
class Coded:
    """Recorded logits as divergence.py reads them: a few rows are decoded at a time."""

    codes: Codes

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.codes), self.codes.shape[1] - _HEAD

    def __getitem__(self, rows: slice) -> Coded:
        return Coded(self.codes[rows])

    def values(self, rows: slice) -> Logits:
        return _decode_below(self.codes[rows])


@dataclass(frozen=True)
class ReferenceLogits:
    """The logits of every part of a complete recording."""

    folder: StageFolder
    parts: tuple[Scored, ...]
    n_vocab: int

    def coded(self, i: int) -> Coded:
        """Logits [n_outputs, n_vocab] of part ``i``, on disk. Raises DynrunError where its file is gone or damaged."""
        path = _file(self.folder, i)
        codes = _read_codes(path, (len(self.parts[i].outputs), _HEAD + self.n_vocab))
        if codes is None:
            self.discard()
            raise DynrunError(f"{path} is gone, damaged, or of other logits", fix="run the same command again")
        return Coded(codes)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(len(part.outputs) for part in self.parts) * row_bytes(self.n_vocab)

    def discard(self) -> None:
        """Delete the recording."""
        shutil.rmtree(self.folder.path, ignore_errors=True)


def row_bytes(n_vocab: int) -> int:
    """Bytes of one scored token on disk."""
    return 2 * (_HEAD + n_vocab)


def record_reference(
    reference: Path,
    parts: Sequence[Scored],
    *,
    n_threads: int,
    n_gpu_layers: int = -1,
    progress: Progress = lambda *_: None,
) -> ReferenceLogits:
    """Decode ``parts`` with the model at ``reference`` and keep the logits; found again, nothing is loaded.

    ``progress`` gets tokens done, tokens in all, and a note. Raises DoesNotFitError where the disk is too small,
    DynrunError where the model's logits are not finite: it names the tensor.
    """
    folder = reference_folder(reference, parts)
    with folder.locked():
        if not folder.complete:
            started = time.monotonic()
            with open_for(reference, parts, n_threads=n_threads, n_gpu_layers=n_gpu_layers) as engine:
                record_into(folder, parts, engine.n_vocab, lambda part: _finite(engine, part), progress)
                folder.commit({"n_vocab": engine.n_vocab}, elapsed_s=time.monotonic() - started)
        return ReferenceLogits(folder, tuple(parts), _n_vocab(folder))


def _n_vocab(folder: StageFolder) -> int:
    try:
        return int(folder.manifest()["result"]["n_vocab"])
    except MALFORMED as error:
        shutil.rmtree(folder.path, ignore_errors=True)
        raise DynrunError(f"{folder / MANIFEST} is damaged", fix="run the same command again") from error


def open_for(path: Path, parts: Sequence[Scored], *, n_threads: int, n_gpu_layers: int = -1) -> Engine:
    """An engine that takes every part, in decodes of so many tokens that their logits take 256 MB at most."""
    longest = max(len(part.tokens) for part in parts)
    n_vocab = max(1, len(read_header(path).metadata.get("tokenizer.ggml.tokens", ())))
    n_batch = min(longest, max(16, _DECODE_BYTES // (4 * n_vocab)))
    # Equal decodes rather than a short one at the end.
    n_batch = -(-longest // -(-longest // n_batch))
    size: dict[str, Any] = {"n_ctx": longest, "n_batch": n_batch, "n_threads": n_threads}
    return Engine.open(path, **size, n_gpu_layers=n_gpu_layers, fixed=True)


def score(engine: Engine, part: Scored) -> Iterator[Logits]:
    """The logits of ``part``'s outputs in blocks; each is gone when the next one is asked for."""
    return engine.logit_blocks(part.tokens, part.outputs, engine.n_batch)


def _finite(engine: Engine, part: Scored) -> Iterator[Logits]:
    for block in score(engine, part):
        if not np.isfinite(block.max(axis=1)).all():
            raise not_finite(engine, engine.path, part.tokens, part.name)
        yield block


def reference_folder(reference: Path, parts: Sequence[Scored]) -> StageFolder:
    """Where the logits of ``reference`` on ``parts`` are kept."""
    return stage_folder(
        "reference", {"reference": model_sha256(reference), "parts": parts_key(parts), **engine_inputs()}
    )


def model_sha256(path: Path) -> str:
    """The hash of a GGUF, of a split one that of its shards' hashes. Raises what reading the headers raises."""
    shards = [sha256_file(header.path) for header in read_shards(path)]
    return shards[0] if len(shards) == 1 else sha256_bytes("\n".join(shards).encode())


def ignored_recordings(reference: Path, parts: Sequence[Scored]) -> str:
    """What is said of logits of ``reference`` that are kept but of other settings; "" where there are none or the
    right ones are there too."""
    wanted = reference_folder(reference, parts)
    if wanted.complete:
        return ""
    reasons: dict[str, str] = {}
    for path in sorted(wanted.path.parent.glob(f"*/{MANIFEST}")):
        try:
            inputs: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8"))["inputs"])
        except (OSError, *MALFORMED):
            continue
        if inputs.get("reference") == wanted.inputs["reference"]:
            other = [key for key in wanted.inputs if inputs.get(key) != wanted.inputs[key]]
            reasons |= {key: _OTHER[key].format(str(inputs.get(key))) for key in other}
    if not reasons:
        return ""
    return f"kept log-probabilities of {reference.name} are not used: they are of {', '.join(reasons.values())}"


def engine_inputs() -> dict[str, Any]:
    """What logits depend on besides model and tokens, for the keys of stages."""
    return {"format": _FORMAT, "llama_cpp": installation().commit, "backend": installation().backend}


def record_into(
    folder: StageFolder,
    parts: Sequence[Scored],
    n_vocab: int,
    score: Callable[[Scored], Iterable[Logits]],
    progress: Progress = lambda *_: None,
) -> None:
    """Write the logits that ``score`` gives, block by block, for each part that ``folder`` lacks.

    A block is written, and a part brought to the disk, while the next block is decoded.
    """
    missing = [i for i in range(len(parts)) if not _file(folder, i).is_file()]
    _check_disk(folder.path, sum(len(parts[i].outputs) for i in missing) * row_bytes(n_vocab))
    total = sum(len(part.tokens) for part in parts)
    done = total - sum(len(parts[i].tokens) for i in missing)
    blocks = (encode_logits(block) for i in missing for block in score(parts[i]))
    with closing(ahead(blocks)) as coming:
        for i in missing:
            n_rows = len(parts[i].outputs)
            with atomic_path(_file(folder, i)) as temporary, temporary.open("wb") as stream:
                stream.write(_npy_head((n_rows, _HEAD + n_vocab)))
                while n_rows:
                    codes = next(coming)
                    codes.tofile(stream)
                    n_rows -= len(codes)
            done += len(parts[i].tokens)
            progress(done, total, "reference")


def _npy_head(shape: tuple[int, int]) -> bytes:
    """The first bytes of a file of codes; compared, not parsed, when it is read."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<u2", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def _read_codes(path: Path, shape: tuple[int, int]) -> Codes | None:
    """The codes in ``path``; None where it is not whole, or maxima and ranges are none of :func:`encode_logits`."""
    head, n_bytes = _npy_head(shape), 2 * shape[0] * shape[1]
    try:
        with path.open("rb") as stream:
            if stream.read(len(head)) != head or path.stat().st_size != len(head) + n_bytes:
                return None
        codes = np.asarray(np.memmap(path, "<u2", "r", len(head), shape))
    except (OSError, ValueError):
        return None
    top, spread = _heads(codes).T
    return codes if np.isfinite(top).all() and ((spread > 0) & (spread <= np.float32(_RANGE_NATS))).all() else None


def _file(folder: StageFolder, i: int) -> Path:
    return folder / f"{i:05d}.npy"


def _check_disk(path: Path, needed: int) -> None:
    existing = next(folder for folder in (path, *path.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DoesNotFitError(
            f"the reference's logits take {needed / 1e9:.1f} GB in {path} and {free / 1e9:.1f} GB are free",
            fix="score fewer tokens, free some space, or set DYNRUN_CACHE to another disk",
        )
