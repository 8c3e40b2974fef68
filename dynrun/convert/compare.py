"""Is the GGUF the same model? Its tensors against those of the safetensors.

Names are mapped by gguf-py's own table. A converter may stack, split, fuse and transpose, so elements are counted: of
each tensor that keeps its identity, and of all others together. Reads headers only; `dynrun lint` looks at the
metadata, logits.py at what they do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynrun.convert.folder import Source
from dynrun.convert.weights import Weight, is_mtp, weights_of
from dynrun.errors import DynrunError
from dynrun.gguf.header import Header, TensorInfo, read_header

# Written from the configuration, not from tensors.
_DERIVED = re.compile(r"rope_(freqs|factors_\w+)\.weight$|\.(input_)?scale$")
# Of a model, and of an mmproj's two.
_ENCODERS = ("", "vision.", "audio.")
# So much of the source may be missing before it is another model: padding of a vocabulary.
_LOST_SHARE = 0.01


@dataclass(frozen=True)
class _Account:
    """``pairs``: tensors of the result and what they were made of; ``left``: sources, ``extra``: results that nothing
    of the other side answers to; ``mtp``: MTP layers that the result is without; ``total``: elements of the source."""

    pairs: Mapping[str, Sequence[Weight]]
    left: tuple[Weight, ...]
    extra: tuple[str, ...]
    mtp: tuple[Weight, ...]
    total: int


def compare(path: Path, source: Source, part: str = "model") -> list[str]:
    """What differs between the converted GGUF at ``path`` and ``part`` of its source, in words; nothing mostly.

    Raises DynrunError where weights of a model are missing.
    """
    header = read_header(path)
    account = _account(header, source, part)
    findings = [said for name, weights in account.pairs.items() if (said := _differs(header.tensors[name], weights))]
    left, extra = _sum(account.left), sum(header.tensors[name].n_elements for name in account.extra)
    if left != extra:
        first = min((weight.name for weight in account.left), default="") or min(account.extra)
        findings.append(f"{left:,} elements of the source became {extra:,}: {first} and others")
    lost = max(0, left - extra) + sum(
        max(0, _sum(weights) - header.tensors[name].n_elements) for name, weights in account.pairs.items()
    )
    if part == "model" and lost > _LOST_SHARE * account.total:
        raise DynrunError(
            f"the converter left out {lost:,} of {account.total:,} weights of {source.folder}: {findings[0]}",
            fix="report it; take a GGUF of the model, if there is one",
        )
    if account.mtp:
        findings.append(f"the converter leaves out this architecture's MTP head ({_sum(account.mtp):,} elements)")
    return findings


def _sum(weights: Iterable[Weight]) -> int:
    return sum(weight.n_elements for weight in weights)


def _differs(tensor: TensorInfo, weights: Sequence[Weight]) -> str:
    """Of a tensor and what it was made of; "" where they agree. Transposed and squeezed is no difference."""
    if (wanted := _sum(weights)) != tensor.n_elements:
        return f"{tensor.name} has {tensor.n_elements:,} elements of {wanted:,}"
    if len(weights) == 1 and not weights[0].is_packed and _sizes(weights[0].shape) != _sizes(tensor.shape):
        return f"{tensor.name} has the shape {tensor.shape}, {weights[0].name} {weights[0].shape}"
    return ""


def _sizes(shape: Iterable[int]) -> list[int]:
    return sorted(n for n in shape if n > 1)


def _account(header: Header, source: Source, part: str) -> _Account:
    names = _NameMap(header)
    pairs: dict[str, list[Weight]] = {}
    left, mtp, total = [], [], 0
    takes_mtp = f"{header.architecture}.nextn_predict_layers" in header.metadata
    for weight in weights_of(source, part):
        if not takes_mtp and is_mtp(weight.name, source.config):
            mtp.append(weight)
            continue
        total += weight.n_elements
        target = names.target(weight.name)
        if target is not None and target in header.tensors:
            pairs.setdefault(target, []).append(weight)
        elif target != "output.weight":
            left.append(weight)
    # Without an output of its own the model is tied: the source's is the embedding's twin.
    extra = [name for name in header.tensors if name not in pairs and not _DERIVED.search(name)]
    return _Account(pairs, tuple(left), tuple(extra), tuple(mtp), total)


class _NameMap:
    """The name in the GGUF of a tensor of the source, by gguf-py's table."""

    def __init__(self, header: Header) -> None:
        import gguf

        known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        counts = (header.metadata.get(f"{header.architecture}.{kind}block_count", 0) for kind in _ENCODERS)
        blocks = max(map(int, counts))
        arch = known.get(header.architecture)
        self._map = gguf.get_tensor_name_map(arch, blocks) if arch is not None else None

    def target(self, name: str) -> str | None:
        """None where the table has no such name."""
        if self._map is None:
            return None
        stacked = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        for one in (name, stacked, stacked.replace("language_model.", "", 1)):
            found = self._map.get_name(one, try_suffixes=(".weight", ".bias"))
            if found is not None:
                return str(found)
        # Some experts are stacked already, and have no suffix.
        found = self._map.get_name(stacked)
        return f"{found}.weight" if found else None
