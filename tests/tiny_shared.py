"""A tiny random model of architecture gemma4 whose last layers have no keys and values of their own.

They read those of the last layer of their kind, with a sliding window or without (llama.cpp, src/models/gemma4.cpp, and
`layer_reuse_cb` in src/llama-model.cpp).
"""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFWriter

from tests.tiny import CHAT_TEMPLATE, _add_tokenizer, _write

N_VOCAB, N_EMBD, N_FF, N_HEAD, N_HEAD_KV, N_WINDOW = 320, 256, 256, 4, 2, 8
N_HEAD_DIM = N_EMBD // N_HEAD


def write_tiny_shared(path: Path, *, n_block: int = 4, n_shared: int = 2, n_per_layer: int = 0, seed: int = 0) -> Path:
    """Write an F16 model whose last ``n_shared`` blocks share; the same arguments, the same bytes.

    With ``n_per_layer`` every block adds so many values of a token's own, as those of E2B and E4B do.
    """
    writer = GGUFWriter(path, "gemma4")
    writer.add_block_count(n_block)
    writer.add_context_length(2048)
    writer.add_embedding_length(N_EMBD)
    writer.add_embedding_length_per_layer_input(n_per_layer)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_layer_norm_rms_eps(1e-6)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_key_length_swa, writer.add_value_length_swa):
        add(N_HEAD_DIM)
    for add in (writer.add_rope_dimension_count, writer.add_rope_dimension_count_swa):
        add(N_HEAD_DIM)
    writer.add_sliding_window(N_WINDOW)
    writer.add_sliding_window_pattern([block % 2 == 0 for block in range(n_block)])
    writer.add_shared_kv_layers(n_shared)
    writer.add_vocab_size(N_VOCAB)
    _add_tokenizer(writer, N_VOCAB, CHAT_TEMPLATE)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (N_VOCAB, N_EMBD), "output_norm": (N_EMBD,)}
    shapes["rope_freqs"] = (N_HEAD_DIM // 2,)
    if n_per_layer:
        shapes |= {"per_layer_token_embd": (N_VOCAB, n_per_layer * n_block), "per_layer_proj_norm": (n_per_layer,)}
        shapes["per_layer_model_proj"] = (n_per_layer * n_block, N_EMBD)
    for block in range(n_block):
        own = _block(has_kv=block < n_block - n_shared, n_per_layer=n_per_layer)
        shapes |= {f"blk.{block}.{name}": shape for name, shape in own.items()}
    _write(writer, shapes, seed)
    return path


def _block(*, has_kv: bool, n_per_layer: int) -> dict[str, tuple[int, ...]]:
    n_kv = N_HEAD_KV * N_HEAD_DIM
    norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(norms, (N_EMBD,))
    shapes |= {"attn_q": (N_EMBD, N_EMBD), "attn_q_norm": (N_HEAD_DIM,), "attn_output": (N_EMBD, N_EMBD)}
    if has_kv:
        shapes |= {"attn_k": (n_kv, N_EMBD), "attn_v": (n_kv, N_EMBD), "attn_k_norm": (N_HEAD_DIM,)}
    if n_per_layer:
        shapes |= {"inp_gate": (n_per_layer, N_EMBD), "proj": (N_EMBD, n_per_layer), "post_norm": (N_EMBD,)}
    return shapes | {"ffn_gate": (N_FF, N_EMBD), "ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF)}
