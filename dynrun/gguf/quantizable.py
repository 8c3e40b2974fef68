"""Which tensors llama-quantize may quantize, and to which types without aborting.

Follows tensor_allows_quantization, tensor_requires_imatrix and init_quantize_state_counters of src/llama-quant.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from dynrun.gguf.header import Header, TensorInfo
from dynrun.gguf.tensor_types import DEFAULT_MENU, TENSOR_TYPES, substitutes

_KEPT = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight"),
    *("time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight"),
    *("time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight"),
    *("time_mix_a2.weight", "time_mix_g1.weight", "time_mix_g2.weight", "time_mix_decay_w1.weight"),
    *("time_mix_decay_w2.weight", "time_mix_lerp_fused.weight", "attn_rel_b.weight", ".position_embd"),
    *("sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook"),
    "mm.a.code_embd",
)
_KEPT_WHOLE = frozenset({"position_embd.weight", "token_types.weight"})
_KEPT_GLM5_NEXT = (
    *("hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate"),
    *("indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight"),
    *("ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight"),
)
# llama-quantize checks no imatrix for these tensors; ggml_quantize_chunk still asserts for these types.
_UNCHECKED = frozenset({"token_embd.weight", "per_layer_token_embd.weight", "output.weight"})
_ASSERTING = frozenset({"IQ1_S", "IQ2_XXS", "IQ2_XS"})
# An MTP block may have an imatrix entry, but no evaluation or probe runs it (it changes the speed of drafts, not the
# logits): it gets a type that is good without a measurement.
_UNMEASURED_MIN_BPW = 4.5


def is_quantizable(tensor: TensorInfo, architecture: str) -> bool:
    """Whether llama-quantize would quantize ``tensor``."""
    name = tensor.name
    if len(tensor.shape) < 2 or not name.endswith("weight") or name in _KEPT_WHOLE:
        return False
    kept = _KEPT + (_KEPT_GLM5_NEXT if architecture == "glm5-next" else ())
    return not any(part in name for part in kept)


def quantizable(header: Header) -> dict[str, TensorInfo]:
    """The tensors of a model that llama-quantize would quantize, in the file's order."""
    return {n: t for n, t in header.tensors.items() if is_quantizable(t, header.architecture)}


def mtp_blocks(metadata: Mapping[str, Any]) -> range:
    """The numbers of the multi-token-prediction blocks, the last of a model's blocks; empty where it has none."""
    architecture = metadata.get("general.architecture", "")
    n_block, n_mtp = (metadata.get(f"{architecture}.{key}", 0) for key in ("block_count", "nextn_predict_layers"))
    if type(n_block) is not int or type(n_mtp) is not int:
        return range(0)
    return range(n_block - n_mtp, n_block)


def is_mtp(name: str, metadata: Mapping[str, Any]) -> bool:
    """Whether a tensor lies in a multi-token-prediction block, which no evaluation runs."""
    match = re.match(r"blk\.(\d+)\.", name)
    return bool(match and int(match[1]) in mtp_blocks(metadata))


def candidate_types(
    tensor: TensorInfo, menu: Iterable[str], imatrix: Collection[str], metadata: Mapping[str, Any]
) -> list[str]:
    """The types of ``menu`` that ``tensor`` can be given; ``imatrix`` holds the names that have an entry.

    Where none is, the nearest ones of the default menu (:func:`substitutes`): F16 is always possible, so the list is
    never empty.
    """
    menu = tuple(menu)
    if types := _possible(tensor, menu, imatrix, metadata):
        return types
    return substitutes(menu, _possible(tensor, DEFAULT_MENU, imatrix, metadata)) or ["F16"]


def _possible(
    tensor: TensorInfo, menu: Iterable[str], imatrix: Collection[str], metadata: Mapping[str, Any]
) -> list[str]:
    types = [name for name in menu if TENSOR_TYPES[name].fits(tensor.shape[0])]
    if tensor.name not in imatrix:
        unchecked = tensor.name in _UNCHECKED
        types = [t for t in types if not TENSOR_TYPES[t].needs_imatrix or (unchecked and t not in _ASSERTING)]
    if is_mtp(tensor.name, metadata):
        types = [t for t in types if TENSOR_TYPES[t].bpw >= _UNMEASURED_MIN_BPW]
    return types
