"""A tiny random model of architecture hy_v3 whose last blocks are multi-token-prediction (MTP) blocks.

The simplest whose MTP graph llama.cpp runs: plain attention, dense or with experts, one MTP block or more
(src/models/hy-v3.cpp).
"""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFWriter

from tests.tiny import CHAT_TEMPLATE, _add_tokenizer, _block, _write

N_VOCAB, N_EMBD, N_FF, N_HEAD, N_HEAD_KV = 320, 256, 256, 4, 2


def write_tiny_mtp(
    path: Path, *, n_block: int = 2, n_mtp: int = 1, n_expert: int = 0, without: str = "none", seed: int = 0
) -> Path:
    """Write an F16 model of ``n_block`` blocks and ``n_mtp`` MTP blocks more; with ``n_expert`` those have experts.

    Tensors whose name contains ``without`` are left out.
    """
    writer = GGUFWriter(path, "hy_v3")
    writer.add_block_count(n_block + n_mtp)
    writer.add_nextn_predict_layers(n_mtp)
    writer.add_context_length(2048)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_expert_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(N_EMBD // N_HEAD)
    writer.add_vocab_size(N_VOCAB)
    if n_expert:
        writer.add_expert_count(n_expert)
        writer.add_expert_used_count(2)
    _add_tokenizer(writer, N_VOCAB, CHAT_TEMPLATE)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (N_VOCAB, N_EMBD),
        "output_norm": (N_EMBD,),
        "output": (N_VOCAB, N_EMBD),
    }
    for block in range(n_block + n_mtp):
        parts = _mtp_block(n_expert) if block >= n_block else _attention_and(0)
        shapes |= {f"blk.{block}.{name}": shape for name, shape in parts.items()}
    _write(writer, {name: shape for name, shape in shapes.items() if without not in name}, seed)
    return path


def _attention_and(n_expert: int) -> dict[str, tuple[int, ...]]:
    n_head_dim = N_EMBD // N_HEAD
    shapes = _block(N_EMBD, n_head_dim * N_HEAD_KV, N_FF, n_expert)
    shapes |= {"attn_q_norm": (n_head_dim,), "attn_k_norm": (n_head_dim,)}
    if n_expert:
        shapes |= {"ffn_gate_shexp": (N_FF, N_EMBD), "ffn_up_shexp": (N_FF, N_EMBD), "ffn_down_shexp": (N_EMBD, N_FF)}
    return shapes


def _mtp_block(n_expert: int) -> dict[str, tuple[int, ...]]:
    shapes = _attention_and(n_expert)
    shapes |= {"nextn.eh_proj": (N_EMBD, 2 * N_EMBD), "nextn.enorm": (N_EMBD,), "nextn.hnorm": (N_EMBD,)}
    return shapes | {"nextn.shared_head_norm": (N_EMBD,)}
