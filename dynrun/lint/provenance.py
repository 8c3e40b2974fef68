"""Where a quant comes from: its imatrix, its scheme, and what its metadata tell of somebody's disk."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from dynrun.gguf.quant_label import label_of
from dynrun.gguf.quantizable import is_quantizable
from dynrun.gguf.tensor_types import FULL_PRECISION, TENSOR_TYPES
from dynrun.lint.finding import Finding, Subject, shown

_IMATRIX = "quantize.imatrix."
_HASH = re.compile(r"[0-9a-f]{64}")
_LOCAL_PATH = re.compile(r"^(?:/|[A-Za-z]:\\|\\\\|~)")
# So few chunks of 512 tokens leave most experts, and many columns, without data.
_LEAST_CHUNKS = 32


def check_provenance(subject: Subject) -> Iterator[Finding]:
    """Of files that are quantized; a full-precision model needs none."""
    metadata, tensors = subject.header.metadata, subject.header.tensors
    weights = [tensor for tensor in tensors.values() if is_quantizable(tensor, subject.architecture)]
    quantized = [tensor for tensor in weights if tensor.type not in FULL_PRECISION]
    if not metadata.get("general.name"):
        yield Finding("name-missing", "info", "general.name", "the model's name", "none")
    if not quantized:
        return
    needy = sorted({tensor.type for tensor in quantized if TENSOR_TYPES[tensor.type].needs_imatrix})
    if f"{_IMATRIX}file" not in metadata:
        if needy:
            expected = f"an imatrix: {', '.join(needy)} are poor without"
            yield Finding("imatrix-missing", "warning", f"{_IMATRIX}file", expected, "none")
        else:
            yield Finding(
                "imatrix-missing", "info", f"{_IMATRIX}file", "an imatrix, where it was made with one", "none"
            )
    else:
        yield from _imatrix(subject)
    yield from _dynrun(subject)
    yield from _label(subject, [tensor.type for tensor in quantized])


def _imatrix(subject: Subject) -> Iterator[Finding]:
    metadata = subject.header.metadata
    chunks = metadata.get(f"{_IMATRIX}chunks_count")
    if isinstance(chunks, int) and 0 < chunks < _LEAST_CHUNKS:
        expected = f"{_LEAST_CHUNKS} chunks or more"
        yield Finding("imatrix-small", "warning", f"{_IMATRIX}chunks_count", expected, f"{chunks}")
    for name in ("file", "dataset"):
        value = metadata.get(_IMATRIX + name)
        if isinstance(value, str) and _LOCAL_PATH.match(value):
            expected = "no path of the disk it was made on"
            yield Finding("path-leaked", "info", _IMATRIX + name, expected, shown(value))


def _dynrun(subject: Subject) -> Iterator[Finding]:
    metadata = subject.header.metadata
    if "dynrun.version" not in metadata:
        return
    for name in ("dynrun.scheme.sha256", "dynrun.imatrix.sha256"):
        value = metadata.get(name)
        if not isinstance(value, str) or not _HASH.fullmatch(value):
            yield Finding("scheme-provenance", "warning", name, "a SHA-256", shown(value or "none"))


def _label(subject: Subject, types: list[str]) -> Iterator[Finding]:
    """The file's type says something else than its tensors."""
    if "dynrun.label" in subject.header.metadata or "general.file_type" not in subject.header.metadata:
        return
    label, (common, _) = label_of(subject.header), Counter(types).most_common(1)[0]
    stem = label.removesuffix("_S").removesuffix("_M").removesuffix("_L").removesuffix("_MOE")
    if label in FULL_PRECISION:
        said = f"{label}, of a file that is mostly {common}"
        yield Finding("file-type", "warning", "general.file_type", "the quantization's", said)
    elif stem in TENSOR_TYPES and stem not in types and f"{stem}_S" not in types and not stem.startswith("IQ"):
        yield Finding("file-type", "info", "general.file_type", f"a file with {stem} tensors", f"mostly {common}")
