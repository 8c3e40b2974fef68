"""The weights that the tensors of a source are, once the converter has unpacked them, and of which part of the model.

GPTQ, compressed-tensors, MXFP4, NVFP4 and BitNet keep several elements in a byte or a word, under names of their own,
with tensors of scales and zero points beside them; config.json's quantization_config says how.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dynrun.convert.folder import Source
from dynrun.convert.stored import StoredTensor

# Derived, or of no use to llama.cpp (prepare_tensors and dequant_model of conversion/base.py).
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$|\.masked_bias$")
# Beside packed weights.
_BESIDE = re.compile(
    r"[._]scale(s|_inv|_2)?$|\.qscale_(weight|act)$|_zero_point$|\.(qzeros|g_idx|weight_shape)$", re.ASCII
)
_PACKED = re.compile(r"\.qweight$|\.weight_packed$|\.weight$|_blocks$")
_INTEGERS = ("I32", "U8", "I8")
# Of other parts than the language model: they go into the mmproj, or nowhere.
_OTHER_PARTS = re.compile(
    r"(^|\.)(vision_\w+|visual|audio_\w+|multi_?modal_projector|image_newline|embed_(vision|audio)\w*)\."
)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_MTP = re.compile(r"(^|\.)mtp\.")
# What an MTP head needs besides its own.
_ENDS = re.compile(r"(^|\.)(embed_tokens|norm|lm_head)\.weight$")


@dataclass(frozen=True)
class Weight:
    """``name`` as an unpacked checkpoint has it; ``shape`` as it is stored; ``kept_bytes``: of one that llama.cpp takes
    packed, with its scales; 0 where it becomes the type of the others."""

    name: str
    n_elements: int
    shape: tuple[int, ...]
    dtype: str
    kept_bytes: int = 0

    @property
    def is_packed(self) -> bool:
        return self.n_elements != math.prod(self.shape)


def weights_of(source: Source, part: str = "model") -> Iterator[Weight]:
    """The weights of ``part``. MTP layers are of the model too, where the converter takes them."""
    bits, kept = packed_bits(source.config), _is_fp4(source.config)
    for name, tensor in source.tensors.items():
        if not _IGNORED.search(name) and _is_of(name, part, source.config):
            if not _BESIDE.search(name):
                yield _weight(tensor, bits, kept=kept)
            elif kept and len(tensor.shape) > 1:
                yield Weight(name, 0, tensor.shape, tensor.dtype, tensor.nbytes)


def _weight(tensor: StoredTensor, bits: int, *, kept: bool) -> Weight:
    if len(tensor.shape) < 2 or tensor.dtype not in _INTEGERS or not _PACKED.search(tensor.name):
        return Weight(tensor.name, tensor.n_elements, tensor.shape, tensor.dtype)
    name = re.sub(r"\.(qweight|weight_packed)$", ".weight", tensor.name).removesuffix("_blocks")
    return Weight(name, tensor.nbytes * 8 // bits, tensor.shape, tensor.dtype, tensor.nbytes if kept else 0)


def _is_of(name: str, part: str, config: Mapping[str, Any]) -> bool:
    if part == "mmproj":
        return bool(_OTHER_PARTS.search(name))
    if _OTHER_PARTS.search(name):
        return False
    own = "layers." not in name and bool(_ENDS.search(name))
    return part == "model" or own or is_mtp(name, config)


def is_mtp(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the tensor is of a multi-token-prediction layer: behind the last of the model's own."""
    text = config.get("text_config")
    n_layers = (text if isinstance(text, dict) else config).get("num_hidden_layers")
    layer = _LAYER.search(name)
    behind = layer is not None and isinstance(n_layers, int) and int(layer[1]) >= n_layers
    return behind or bool(_MTP.search(name))


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("quantization_config")
    return found if isinstance(found, dict) else {}


def _is_fp4(config: Mapping[str, Any]) -> bool:
    """MXFP4 and NVFP4, which GGUF has types for."""
    said = _quantization(config)
    return any("fp4" in str(said.get(key, "")).lower() for key in ("quant_method", "format", "quant_algo"))


def packed_bits(config: Mapping[str, Any]) -> int:
    """Of an element of a packed weight, by the configuration's own word; 8 where it says nothing."""
    said = _quantization(config)
    groups = said.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    grouped = weights.get("num_bits") if isinstance(weights, dict) else None
    known = 4 if _is_fp4(config) else 2 if said.get("quant_method") == "bitnet" else 8
    bits = said.get("bits") or grouped or known
    return bits if isinstance(bits, int) and 1 <= bits <= 8 else known
