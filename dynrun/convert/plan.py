"""What a conversion will need: the type of the result, its bytes on the disk, the memory of the converter.

Takes a :class:`Source`, reads its tokenizer once more for its size; converts nothing.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynrun.convert.folder import Source
from dynrun.convert.weights import Weight, is_mtp, weights_of
from dynrun.errors import MALFORMED, DoesNotFitError, UsageError

_EXPERT = re.compile(r"\.experts\.\d+\.")
# Stored in another form, weights are unpacked to BF16, which has the range of all of them.
_OUT_TYPES = {"F16": "f16", "BF16": "bf16", "F32": "f32", "F64": "f32"}
_ELEMENT_BYTES = {"f16": 2, "bf16": 2, "f32": 4}
# Measured (benchmarks/convert.py), on Linux with torch for the CPU: the converter with its packages and no tensor, and
# bytes for each element of the largest tensor that it writes. F16 and F32 are written as they are mapped; BF16 goes
# through float32.
_BASE_BYTES = 415_000_000
_WORKING_BYTES = {"f16": 1.85, "f32": 3.7, "bf16": 7.5}
# The matrices that end an attention or a feed-forward: their input is their own.
_LAST = re.compile(r"o_proj|down_proj|out_proj|c_proj|dense|wo|w2")
# Of the reference: a file and its preset at up to half of it each, and as much again of tensors in several types.
_FILE_SHARE = 1.5
# A key, a type and a length for each entry, and the fixed keys.
_METADATA_BYTES = 6_000


@dataclass(frozen=True)
class ConversionPlan:
    """``out_type`` as the converter names it; bytes of the result, and the converter's peak memory."""

    out_type: str
    result_bytes: int
    memory_bytes: int

    @property
    def type_name(self) -> str:
        """As GGUF names it."""
        return self.out_type.upper()


def plan_conversion(source: Source, part: str = "model") -> ConversionPlan:
    """What converting ``part`` of ``source`` will need. The precision is that of most of its weights.

    Raises UsageError where an MTP head is wanted of a source that has none: the converter would write the rest.
    """
    if part == "mtp" and not any(is_mtp(name, source.config) for name in source.tensors):
        raise UsageError(f"{source.folder} has no MTP head", fix="leave --part out")
    # Names of image encoders are many: of one that is not known the whole model is the limit.
    weights = list(weights_of(source, part)) or list(weights_of(source))
    out_type = out_type_of(weights)
    size = sum(_result_bytes(weight, out_type) for weight in weights) + _METADATA_BYTES
    if part != "mmproj":
        size += _tokenizer_bytes(source.files)
    return ConversionPlan(out_type, size, int(_BASE_BYTES + _largest(weights) * _WORKING_BYTES[out_type]))


def following_bytes(source: Source, n_files: int) -> int:
    """About what `make` writes after the reference: covariances, and for each file itself, its stock preset and the
    tensors rounded for it."""
    inputs: dict[tuple[str, int, bool], int] = {}
    for name, tensor in source.tensors.items():
        parent, _, kind = name.removesuffix(".weight").rpartition(".")
        if len(tensor.shape) == 2 and "." in parent:
            # What reads one input shares its covariance, a float32 triangle: q, k and v; gate and up.
            width, last = tensor.shape[1], bool(_LAST.match(kind))
            inputs[parent, width, last] = 2 * width * width
    reference = plan_conversion(source).result_bytes
    return sum(inputs.values()) + int(n_files * _FILE_SHARE * reference)


def _largest(weights: Sequence[Weight]) -> int:
    """Elements of the largest tensor that will be written: the experts of a layer are stacked."""
    stacked: Counter[str] = Counter()
    for weight in weights:
        stacked[_EXPERT.sub(".experts.", weight.name)] += weight.n_elements
    return max(stacked.values(), default=0)


def out_type_of(weights: Iterable[Weight]) -> str:
    """The converter's output type that keeps the precision of most of the matrices' elements."""
    counted: Counter[str] = Counter()
    for weight in weights:
        if len(weight.shape) > 1:
            counted[_OUT_TYPES.get(weight.dtype, "bf16")] += weight.n_elements
    return counted.most_common(1)[0][0] if counted else "f16"


def _result_bytes(weight: Weight, out_type: str) -> int:
    return weight.kept_bytes or weight.n_elements * (4 if len(weight.shape) < 2 else _ELEMENT_BYTES[out_type])


def _tokenizer_bytes(files: Mapping[str, Path]) -> int:
    """Tokens, their types and merges as GGUF stores them: eight bytes of length before each text."""
    if (path := files.get("tokenizer.json")) is None:
        model = files.get("tokenizer.model")
        # Beside the tokens it holds the table of the normalizer, which GGUF does not take.
        return max(0, 3 * (model.stat().st_size - 240_000) // 2) if model else 0
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        tokens, merges = list(model["vocab"]), model.get("merges", ())
    except MALFORMED:
        return path.stat().st_size
    names = [one if isinstance(one, str) else str(one[0]) for one in tokens]
    joined = [one if isinstance(one, str) else " ".join(map(str, one)) for one in merges]
    return sum(12 + len(name.encode()) for name in names) + sum(8 + len(merge.encode()) for merge in joined)


def check_disk(plan: ConversionPlan, folder: Path, more_bytes: int = 0) -> None:
    """Raise DoesNotFitError where the result, and ``more_bytes`` of what comes after it, has no room in ``folder``."""
    needed, free = plan.result_bytes + more_bytes, shutil.disk_usage(folder).free
    if free < needed:
        raise DoesNotFitError(
            f"the conversion and what follows need {needed / 1e9:.2f} GB in {folder} and {free / 1e9:.2f} GB are free",
            fix="free some space, or set DYNRUN_CACHE to another disk",
        )
