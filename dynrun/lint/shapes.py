"""Tensors against the architecture: are all there, and have they the shapes that the metadata say?

Shapes are checked of architectures whose attention and FFN are the plain ones; of others, that no layer lacks what
its neighbours have.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from dynrun.gguf.quantizable import mtp_blocks
from dynrun.lint.finding import Finding, Subject

_PLAIN = frozenset(
    {"llama", "llama4", "mistral3", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "gpt-oss"}
    | {"olmo2", "olmoe", "granite", "granitemoe", "mixtral", "smollm3", "exaone4", "seed_oss", "arcee"}
)
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
Shape = tuple[int, ...]


def check_shapes(subject: Subject) -> Iterator[Finding]:
    """Missing blocks and tensors, and wrong shapes."""
    tensors, n_layer = subject.header.tensors, subject.count("block_count")
    if not n_layer:
        yield Finding("blocks-missing", "error", subject.key("block_count"), "the number of layers", "none")
        return
    for name in ("token_embd.weight", "output_norm.weight"):
        if name not in tensors and not (name == "output_norm.weight" and "token_embd_norm.weight" in tensors):
            yield Finding("tensor-missing", "error", name, "a tensor", "none")
    yield from _blocks(subject, n_layer)
    if subject.architecture in _PLAIN:
        yield from _wrong_shapes(subject, n_layer)


def _blocks(subject: Subject, n_layer: int) -> Iterator[Finding]:
    kinds: dict[int, set[str]] = {}
    for name in subject.header.tensors:
        if match := _BLOCK.fullmatch(name):
            kinds.setdefault(int(match[1]), set()).add(match[2])
    expected = range(min(n_layer, 1 << 16))
    if missing := [layer for layer in expected if layer not in kinds]:
        found = f"no tensors of {len(missing)} layers, the first {missing[0]}"
        yield Finding("blocks-missing", "error", f"blk.{missing[0]}", f"{n_layer} layers", found)
    if more := sorted(layer for layer in kinds if layer >= n_layer):
        yield Finding("blocks-too-many", "error", f"blk.{more[0]}", f"{n_layer} layers", f"layers up to {more[-1]}")
    if subject.architecture in _PLAIN:
        yield from _gaps(kinds, set(mtp_blocks(subject.header.metadata)))


def _gaps(kinds: dict[int, set[str]], skipped: set[int]) -> Iterator[Finding]:
    """Tensors that all but a few layers have."""
    layers = {layer: names for layer, names in kinds.items() if layer not in skipped}
    counts = Counter(name for names in layers.values() for name in names)
    for name, n in sorted(counts.items()):
        lacking = [layer for layer, names in sorted(layers.items()) if name not in names]
        # The first layers of some models of experts are dense; what nearly all have and one lacks was forgotten.
        if 0 < len(lacking) <= max(1, len(layers) // 20) and lacking[0] > 3 and n > 3:
            yield Finding("tensor-missing", "error", f"blk.{lacking[0]}.{name}", "as in all other layers", "none")


def _wrong_shapes(subject: Subject, n_layer: int) -> Iterator[Finding]:
    wanted = {"token_embd.weight": _any_rows(subject), "output.weight": _any_rows(subject)}
    wanted |= {"output_norm.weight": (subject.count("embedding_length"),)}
    for name, tensor in subject.header.tensors.items():
        match = _BLOCK.fullmatch(name)
        layer = int(match[1]) if match else 0
        shape = _in_block(subject, layer).get(match[2]) if match and layer < n_layer else wanted.get(name)
        if shape and 0 not in shape and shape != tensor.shape:
            yield Finding("tensor-shape", "error", name, "×".join(map(str, shape)), "×".join(map(str, tensor.shape)))


def _any_rows(subject: Subject) -> Shape:
    """Rows of the embeddings are the vocabulary's, which tokens.py looks at: any number is right here."""
    tensor = subject.header.tensors.get("token_embd.weight")
    rows = tensor.shape[1] if tensor is not None and len(tensor.shape) == 2 else 0
    return (subject.count("embedding_length"), rows)


def _in_block(subject: Subject, layer: int) -> dict[str, Shape]:
    """Shapes of one layer in ggml's order; a 0 stands for a number that the header has not."""
    n_embd, n_head = subject.count("embedding_length"), _of_layer(subject, "attention.head_count", layer)
    n_kv = _of_layer(subject, "attention.head_count_kv", layer) or n_head
    head = n_embd // n_head if n_head else 0
    k = subject.count("attention.key_length") or head
    v = subject.count("attention.value_length") or head
    n_ff, n_expert = _of_layer(subject, "feed_forward_length", layer), subject.count("expert_count")
    n_ff_exp = subject.count("expert_feed_forward_length") or (n_ff if subject.architecture != "llama4" else 0)
    return {
        "attn_norm.weight": (n_embd,),
        "ffn_norm.weight": (n_embd,),
        "attn_q.weight": (n_embd, n_head * k),
        "attn_k.weight": (n_embd, n_kv * k),
        "attn_v.weight": (n_embd, n_kv * v),
        "attn_output.weight": (n_head * v, n_embd),
        "ffn_gate.weight": (n_embd, n_ff),
        "ffn_up.weight": (n_embd, n_ff),
        "ffn_down.weight": (n_ff, n_embd),
        "ffn_gate_inp.weight": (n_embd, n_expert),
        "ffn_gate_exps.weight": (n_embd, n_ff_exp, n_expert),
        "ffn_up_exps.weight": (n_embd, n_ff_exp, n_expert),
        "ffn_down_exps.weight": (n_ff_exp, n_embd, n_expert),
    }


def _of_layer(subject: Subject, name: str, layer: int) -> int:
    """A number of one layer: of a list its own."""
    value = subject.value(name)
    if isinstance(value, list):
        value = value[layer] if layer < len(value) else 0
    return int(value) if type(value) is int else 0
