"""A tiny random model of architecture llama, for tests that need a GGUF and no sense in its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, LlamaFileType, TokenType

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES = ("Ġ t", "h e")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_tiny_llama(
    path: Path,
    *,
    n_vocab: int = 320,
    n_embd: int = 256,
    n_block: int = 2,
    n_ff: int = 512,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_expert: int = 0,
    n_expert_used: int = 2,
    n_ctx_train: int = 2048,
    tied: bool = False,
    chat_template: str | None = CHAT_TEMPLATE,
    merges: tuple[str, ...] = MERGES,
    seed: int = 0,
) -> Path:
    """Write an F16 model (norms and routers F32) with a byte-level vocabulary; the same arguments, the same bytes."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(n_block)
    writer.add_context_length(n_ctx_train)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(n_embd // n_head)
    writer.add_vocab_size(n_vocab)
    if n_expert:
        writer.add_expert_count(n_expert)
        writer.add_expert_used_count(n_expert_used)
    _add_tokenizer(writer, n_vocab, chat_template, merges)
    n_kv = n_embd // n_head * n_head_kv
    shapes = {"token_embd": (n_vocab, n_embd), "output_norm": (n_embd,)}
    if not tied:
        shapes["output"] = (n_vocab, n_embd)
    for block in range(n_block):
        shapes |= {f"blk.{block}.{name}": shape for name, shape in _block(n_embd, n_kv, n_ff, n_expert).items()}
    _write(writer, shapes, seed)
    return path


def _write(writer: GGUFWriter, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    writer.add_name("tiny")
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    random = np.random.default_rng(seed)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", _weight(random, name, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _block(n_embd: int, n_kv: int, n_ff: int, n_expert: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a block's weights as numpy has them: [experts,] rows, columns."""
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (n_embd,),
        "attn_q": (n_embd, n_embd),
        "attn_k": (n_kv, n_embd),
        "attn_v": (n_kv, n_embd),
        "attn_output": (n_embd, n_embd),
        "ffn_norm": (n_embd,),
    }
    if n_expert:
        shapes["ffn_gate_inp"] = (n_expert, n_embd)
    suffix, experts = ("_exps", (n_expert,)) if n_expert else ("", ())
    for name, shape in {"ffn_gate": (n_ff, n_embd), "ffn_up": (n_ff, n_embd), "ffn_down": (n_embd, n_ff)}.items():
        shapes[name + suffix] = (*experts, *shape)
    return shapes


def _weight(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> Any:
    if name.endswith(("norm", "rope_freqs")):
        return (1 + 0.1 * random.standard_normal(shape)).astype(np.float32)
    # Sized so that each block changes the residual stream and the logits differ by a few nats.
    values = random.standard_normal(shape) * (1.0 if name == "token_embd" else 2.0 / np.sqrt(shape[-1]))
    return values.astype(np.float32 if name.endswith("ffn_gate_inp") else np.float16)


def _add_tokenizer(
    writer: GGUFWriter, n_vocab: int, chat_template: str | None, merges: tuple[str, ...] = MERGES
) -> None:
    tokens = [*_byte_characters(), *(merge.replace(" ", "") for merge in merges), *SPECIAL_TOKENS]
    first_special = len(tokens) - len(SPECIAL_TOKENS)
    if n_vocab < len(tokens):
        raise ValueError(f"n_vocab is at least {len(tokens)}")
    types = [TokenType.NORMAL] * first_special + [TokenType.CONTROL] * len(SPECIAL_TOKENS)
    unused = n_vocab - len(tokens)
    tokens += [f"<|unused{i}|>" for i in range(unused)]
    types += [TokenType.UNUSED] * unused
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(first_special + 1)
    writer.add_eos_token_id(first_special + 2)
    writer.add_unk_token_id(first_special)
    writer.add_add_bos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def _byte_characters() -> list[str]:
    """The 256 printable characters that stand for bytes in GPT-2's vocabulary (its encoder.py, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]
