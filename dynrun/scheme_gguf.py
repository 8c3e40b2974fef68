"""A scheme out of any GGUF, whoever made it; and a scheme or a GGUF opened alike, with the shapes where it has them.

Takes headers alone: no weights are read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dynrun.errors import UsageError
from dynrun.gguf.header import Header, TensorInfo
from dynrun.gguf.quant_label import label_of
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.shards import read_whole_header, split_name
from dynrun.gguf.tensor_types import FULL_PRECISION, TENSOR_TYPES, WEIGHT_TYPES
from dynrun.scheme import Scheme, fitting_label, read_scheme
from dynrun.scheme_types import coarseness

_MAGIC = b"GGUF"


@dataclass(frozen=True)
class Opened:
    """A scheme, or a GGUF's; ``shapes`` of the model's tensors, empty where nobody says them.

    ``kept`` are the tensors of the file that no scheme names as llama-quantize never quantizes them: norms, routers.
    """

    path: Path
    scheme: Scheme
    shapes: Mapping[str, TensorInfo]
    kept: Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Share:
    """What one type has of a scheme: ``n_weights`` and ``nbytes`` are None where shapes are unknown."""

    type: str
    n_tensors: int
    n_weights: int | None
    nbytes: int | None


def scheme_of(header: Header) -> Scheme:
    """The types of a GGUF's quantizable tensors, of full precision too, and what its metadata tells.

    ``header`` is of the whole model (:func:`read_whole_header`). label: dynrun's own, else the name of
    general.file_type, else the type of most weights. source: general.name, else the file's. size_bytes: of the file,
    all shards. calibration: quantize.imatrix.dataset. imatrix_sha256, dynrun: of a file that dynrun made. All others
    stay unknown. Raises UsageError where there is nothing to quantize, or a type that no scheme can name.
    """
    tensors = quantizable(header)
    if not tensors or header.metadata.get("general.type", "model") != "model":
        raise UsageError(f"{header.path} has no tensors that a scheme could be about", fix="give a GGUF of a model")
    for name, tensor in tensors.items():
        if tensor.type not in WEIGHT_TYPES:
            raise UsageError(f"{header.path}: {name!r:.80} is {tensor.type}, no type of weights", fix="give a model")

    def text(key: str, default: str = "") -> str:
        value = header.metadata.get(key)
        return value if isinstance(value, str) and value else default

    return Scheme(
        types={name: tensor.type for name, tensor in tensors.items()},
        label=fitting_label(label_of(header)),
        architecture=header.architecture,
        source=text("general.name", split_name(header.path)),
        size_bytes=header.file_bytes,
        calibration=text("quantize.imatrix.dataset"),
        imatrix_sha256=text("dynrun.imatrix.sha256"),
        dynrun=text("dynrun.version"),
    )


def open_scheme(path: Path, tensors: Collection[str] | None = None) -> Opened:
    """``path`` as a scheme: a GGUF where it begins as one, or any shard of one, else a scheme's TOML.

    That is checked against the quantizable ``tensors`` of a model where they are given. Raises what reading either
    raises.
    """
    if not _is_gguf(path):
        return Opened(path, read_scheme(path, tensors), {}, {})
    return opened_gguf(path, read_whole_header(path))


def opened_gguf(path: Path, header: Header) -> Opened:
    """A GGUF as a scheme; ``header`` is of the whole model. Raises what :func:`scheme_of` raises."""
    scheme = scheme_of(header)
    return Opened(
        path,
        scheme,
        {name: header.tensors[name] for name in scheme.types},
        {name: tensor for name, tensor in header.tensors.items() if name not in scheme.types},
    )


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(len(_MAGIC)) == _MAGIC
    except OSError:
        # Whoever reads it next says why it cannot be read.
        return False


def quantized_beyond(opened: Opened) -> dict[str, str]:
    """The types of tensors that are quantized in the file, though llama-quantize never would: no scheme can say so."""
    coarse = set(WEIGHT_TYPES) - set(FULL_PRECISION)
    return {name: tensor.type for name, tensor in opened.kept.items() if tensor.type in coarse}


def shares(types: Mapping[str, str], shapes: Mapping[str, TensorInfo]) -> list[Share]:
    """What each type has of a scheme, coarse to fine."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for name, type_name in types.items():
        names[type_name].append(name)
    return [
        Share(one, len(names[one]), n_weights(names[one], shapes), nbytes(dict.fromkeys(names[one], one), shapes))
        for one in sorted(names, key=coarseness)
    ]


def n_weights(names: Iterable[str], shapes: Mapping[str, TensorInfo]) -> int | None:
    """Weights of tensors; None where a shape is unknown."""
    known = [shapes[name].n_elements if name in shapes else None for name in names]
    return None if None in known else sum(n for n in known if n is not None)


def nbytes(types: Mapping[str, str], shapes: Mapping[str, TensorInfo]) -> int | None:
    """Bytes of the data of tensors in their types, without padding; None where a shape is unknown."""
    if types.keys() - shapes.keys():
        return None
    return sum(TENSOR_TYPES[one].nbytes(shapes[name].n_elements) for name, one in types.items())


def bpw(types: Mapping[str, str], shapes: Mapping[str, TensorInfo]) -> float | None:
    """Bits per weight over the tensors of a scheme; None where a shape is unknown or there are none."""
    n, size = n_weights(types, shapes), nbytes(types, shapes)
    return size * 8 / n if n and size is not None else None
