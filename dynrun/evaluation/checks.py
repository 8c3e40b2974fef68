"""What must be right before divergence is measured, and what people should know of it.

Takes headers, raises errors or gives notes; loads no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynrun.errors import UsageError
from dynrun.gguf.header import Header
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.shards import read_whole_header
from dynrun.gguf.tensor_types import FULL_PRECISION

_TOKENS = "tokenizer.ggml.tokens"
# With the same tokens, these decide which of them a text becomes.
_TOKENIZER = ("tokenizer.ggml.model", "tokenizer.ggml.merges")
# Makers of files mend these; the divergence on given tokens does not depend on them.
_SPLITTING = ("tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix")
_SHAPE = ("embedding_length", "block_count")
_FIX = "compare files that were made from this reference"


def checked_headers(reference: Path, files: Sequence[Path]) -> list[Header]:
    """Headers of ``files``. Raises UsageError for one that is no language model or has another tokenizer."""
    whole = read_whole_header(reference)
    headers = [read_whole_header(file) for file in files]
    for header in (whole, *headers):
        _check_is_model(header)
    for header in headers:
        _check_tokenizer(whole, header)
    return headers


def notes_on(reference: Path, files: Sequence[Path]) -> list[str]:
    """Lines for people: what the divergence of ``files`` from ``reference`` does not say by itself."""
    whole = read_whole_header(reference)
    notes = []
    if coarse := sorted({t.type for t in quantizable(whole).values() if t.type not in FULL_PRECISION}):
        notes.append(
            f"the reference {reference.name} is itself quantized ({', '.join(coarse)}): divergence is from that file, "
            "not from the original model"
        )
    for file in files:
        header = read_whole_header(file)
        notes += [
            f"{file.name} has {key} {header.metadata[key]!r}, the reference {whole.metadata[key]!r}: it is measured on "
            "the reference's tokens and would split texts otherwise"
            for key in _SPLITTING
            if _both_say(whole, header, key)
        ]
        if _shape(header) != _shape(whole):
            notes.append(f"{file.name} is a model of another architecture or shape than the reference")
    return notes


def _both_say(whole: Header, header: Header, key: str) -> bool:
    """Whether they say different things; a file without the key says nothing."""
    values = [one.metadata.get(key) for one in (whole, header)]
    return None not in values and values[0] != values[1]


def _shape(header: Header) -> tuple[Any, ...]:
    prefix = header.architecture
    return (prefix, *(header.metadata.get(f"{prefix}.{key}") for key in _SHAPE))


def _check_is_model(header: Header) -> None:
    kind = header.metadata.get("general.type", "model")
    if not header.architecture or kind != "model" or not header.tensors:
        raise UsageError(f"{header.path} holds no language model (general.type {kind!r})", fix="give a GGUF of a model")
    if not header.metadata.get(_TOKENS):
        raise UsageError(f"{header.path} has no vocabulary", fix="give a GGUF with its tokenizer")


def _check_tokenizer(whole: Header, header: Header) -> None:
    ours, theirs = whole.metadata[_TOKENS], header.metadata[_TOKENS]
    if len(ours) != len(theirs):
        raise UsageError(
            f"{header.path} has another vocabulary than the reference {whole.path}: {len(theirs):,} tokens, not "
            f"{len(ours):,}",
            fix=_FIX,
        )
    if ours != theirs:
        i = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        raise UsageError(
            f"{header.path} has another tokenizer than the reference {whole.path}: token {i} is {theirs[i]!r:.40}, not "
            f"{ours[i]!r:.40}",
            fix=_FIX,
        )
    if different := [key for key in _TOKENIZER if whole.metadata.get(key) != header.metadata.get(key)]:
        raise UsageError(
            f"{header.path} has another tokenizer than the reference {whole.path}: {different[0]} differs", fix=_FIX
        )
