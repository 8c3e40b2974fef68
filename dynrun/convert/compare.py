"""Is the GGUF the same model? Tensors against the safetensors, metadata against config.json.

Names are mapped by gguf-py's own table. A converter may stack, split, fuse and transpose, so elements are counted: of
each tensor that keeps its identity, and of all others together. Reads headers only; logits.py compares what they do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrun.convert.folder import Source
from dynrun.convert.plan import packed_elements
from dynrun.convert.stored import StoredTensor
from dynrun.errors import DynrunError
from dynrun.gguf.header import Header, read_header

# Derived, or of no use to llama.cpp (prepare_tensors and dequant_model of conversion/base.py).
_IGNORED = re.compile(
    r"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$|\.masked_bias$|_scale(_inv|_2)?$|_scales$|_zero_point$|"
    r"\.(qzeros|g_idx|weight_shape)$"
)
# Of other parts than the language model: they go into the mmproj, or nowhere.
_OTHER_PARTS = re.compile(
    r"(^|\.)(vision_\w+|visual|audio_\w+|multi_modal_projector|image_newline|embed_(vision|audio)\w*)\."
)
# Written from the configuration, not from tensors.
_DERIVED = re.compile(r"rope_(freqs|factors_\w+)\.weight$|\.(input_)?scale$")
# So much of the source may be missing before it is another model: padding of a vocabulary.
_LOST_SHARE = 0.01

# config.json's key → GGUF's, without the architecture.
_KEYS: Mapping[str, str] = {
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "num_experts_per_tok": "expert_used_count",
    "num_experts": "expert_count",
    "num_local_experts": "expert_count",
    "n_routed_experts": "expert_count",
}


@dataclass(frozen=True)
class _Account:
    """``pairs``: tensors of the result and the elements that they and their sources have; ``left``: sources, ``extra``:
    results that nothing of the other side answers to."""

    pairs: Mapping[str, tuple[int, int]]
    left: tuple[StoredTensor, ...]
    extra: tuple[str, ...]


def compare(path: Path, source: Source) -> list[str]:
    """What differs between the converted GGUF at ``path`` and its source, in words; nothing mostly.

    Raises DynrunError where weights are missing.
    """
    header = read_header(path)
    account = _account(header, source)
    findings = [
        f"{name} has {got:,} elements of {wanted:,}" for name, (got, wanted) in account.pairs.items() if got != wanted
    ]
    left, extra = sum(t.n_elements for t in account.left), _elements(header, account.extra)
    if left != extra:
        first = min((t.name for t in account.left), default="") or min(account.extra)
        findings.append(f"{left:,} elements of the source became {extra:,}: {first} and others")
    lost = sum(max(0, wanted - got) for got, wanted in account.pairs.values()) + max(0, left - extra)
    total = sum(tensor.n_elements for tensor in _relevant(source))
    if packed_elements(source.config) == 1 and lost > _LOST_SHARE * total:
        raise DynrunError(
            f"the converter left out {lost:,} of {total:,} weights of {source.folder}: {findings[0]}",
            fix="report it; take a GGUF of the model, if there is one",
        )
    return findings + list(differing_metadata(header, source.config))


def _relevant(source: Source) -> Iterator[StoredTensor]:
    for name, tensor in source.tensors.items():
        if not _IGNORED.search(name) and not _OTHER_PARTS.search(name):
            yield tensor


def _elements(header: Header, names: tuple[str, ...]) -> int:
    return sum(header.tensors[name].n_elements for name in names)


def _account(header: Header, source: Source) -> _Account:
    names = _NameMap(header)
    wanted: dict[str, int] = {}
    left = []
    for tensor in _relevant(source):
        target = names.target(tensor.name)
        if target is not None and target in header.tensors:
            wanted[target] = wanted.get(target, 0) + tensor.n_elements
        elif target != "output.weight":
            left.append(tensor)
    # Without an output of its own the model is tied: the source's is the embedding's twin.
    pairs = {name: (header.tensors[name].n_elements, n) for name, n in wanted.items()}
    extra = [name for name in header.tensors if name not in wanted and not _DERIVED.search(name)]
    return _Account(pairs, tuple(left), tuple(extra))


class _NameMap:
    """The name in the GGUF of a tensor of the source, by gguf-py's table."""

    def __init__(self, header: Header) -> None:
        import gguf

        known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        blocks = int(header.metadata.get(f"{header.architecture}.block_count", 0))
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


def differing_metadata(header: Header, config: Mapping[str, Any]) -> Iterator[str]:
    """Where the GGUF's metadata says other sizes than config.json."""
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    for key, ours in _KEYS.items():
        said, got = text.get(key), header.metadata.get(f"{header.architecture}.{ours}")
        # Multi-head latent attention is written as attention with one key-value head; arrays are of each layer.
        if "kv_lora_rank" in text and ours == "attention.head_count_kv":
            continue
        if isinstance(said, int | float) and isinstance(got, int | float) and not math.isclose(said, got, rel_tol=1e-6):
            yield f"{key} is {said} in config.json and {got} in the GGUF"
    layers, blocks = text.get("num_hidden_layers"), header.metadata.get(f"{header.architecture}.block_count")
    if isinstance(layers, int) and isinstance(blocks, int):
        more = text.get("num_nextn_predict_layers") or text.get("mtp_num_hidden_layers") or 0
        if blocks not in (layers, layers + more):
            yield f"num_hidden_layers is {layers} in config.json and the GGUF has {blocks} blocks"
