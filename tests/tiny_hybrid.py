"""A tiny random model of architecture lfm2: a block that is recurrent (a short convolution) and one with attention.

The simplest hybrid that llama.cpp runs (src/models/lfm2.cpp): its memory holds a state for each sequence beside cells.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from tests.tiny import CHAT_TEMPLATE, _add_tokenizer, _weight

N_VOCAB, N_EMBD, N_FF, N_HEAD, N_HEAD_KV, L_CACHE = 320, 256, 256, 4, 2, 3
N_HEAD_DIM = N_EMBD // N_HEAD


def write_tiny_hybrid(path: Path, *, seed: int = 0) -> Path:
    """Write an F16 model; the same arguments, the same bytes."""
    writer = GGUFWriter(path, "lfm2")
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv([0, N_HEAD_KV])
    writer.add_shortconv_l_cache(L_CACHE)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(N_HEAD_DIM)
    writer.add_vocab_size(N_VOCAB)
    _add_tokenizer(writer, N_VOCAB, CHAT_TEMPLATE)
    random = np.random.default_rng(seed)
    for name, shape in _shapes().items():
        values = _weight(random, name, shape)
        # ggml convolves in F32 only.
        writer.add_tensor(f"{name}.weight", values.astype(np.float32) if name.endswith(".conv") else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes() -> dict[str, tuple[int, ...]]:
    n_kv = N_HEAD_KV * N_HEAD_DIM
    feed_forward = {"ffn_gate": (N_FF, N_EMBD), "ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF)}
    norms: dict[str, tuple[int, ...]] = {"attn_norm": (N_EMBD,), "ffn_norm": (N_EMBD,)}
    convolution = {"conv": (N_EMBD, L_CACHE), "in_proj": (3 * N_EMBD, N_EMBD), "out_proj": (N_EMBD, N_EMBD)}
    blocks: tuple[dict[str, tuple[int, ...]], ...] = (
        {f"shortconv.{name}": shape for name, shape in convolution.items()},
        {
            "attn_q": (N_EMBD, N_EMBD),
            "attn_k": (n_kv, N_EMBD),
            "attn_v": (n_kv, N_EMBD),
            "attn_output": (N_EMBD, N_EMBD),
            "attn_q_norm": (N_HEAD_DIM,),
            "attn_k_norm": (N_HEAD_DIM,),
        },
    )
    found: dict[str, tuple[int, ...]] = {"token_embd": (N_VOCAB, N_EMBD), "token_embd_norm": (N_EMBD,)}
    for i, own in enumerate(blocks):
        found |= {f"blk.{i}.{name}": shape for name, shape in {**norms, **own, **feed_forward}.items()}
    return found
