"""Bytes that llama-server needs for a model, by part: KV cache, compute buffers, the process itself.

Takes facts and numbers, gives bytes; decides nothing. Follows src/llama-kv-cache*.cpp, llama-memory-recurrent.cpp and
llama_context::sched_reserve of the pinned llama.cpp; compute buffers are a formula, checked against llama.cpp's own
(tests/native/test_memory.py).
"""

from __future__ import annotations

from dynrun.errors import UsageError
from dynrun.gguf.header import padded
from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.runtime.cache_shape import LayerCache
from dynrun.runtime.model_facts import ModelFacts
from dynrun.runtime.placement import Choice

MIB = 1 << 20
# What common/arg.cpp accepts for -ctk and -ctv.
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
N_UBATCH, N_BATCH = 512, 2048
_CELLS_PAD = 256
# Of a running server without a model: its libraries and threads; of a token of the vocabulary: text, hash maps. Both
# measured (benchmarks/plan.py), as is what is left over after load.
_PROCESS_BYTES, _TOKEN_BYTES = 24 * MIB, 200
# What a CUDA, HIP or Vulkan context takes of the host beside the device.
_DEVICE_CONTEXT_BYTES = 300 * MIB
# Of the image encoder's activations, as a part of its file; an estimate.
_MMPROJ_COMPUTE, _MMPROJ_LEAST = 0.6, 256 * MIB
_MOST_CHECKPOINTS, _CHECKPOINT_TOKENS = 8, 8192


def check_cache_type(name: str) -> str:
    """A KV cache type as llama.cpp spells it. Raises UsageError."""
    if name not in CACHE_TYPES:
        raise UsageError(f"no KV cache type {name!r}", fix=f"one of {', '.join(CACHE_TYPES)}")
    return name


def cells(choice: Choice, window: int = 0) -> int:
    """Cells of one slot's cache; of a layer that sees ``window`` tokens back, what those and a batch take."""
    n_ctx = padded(choice.n_ctx, _CELLS_PAD)
    return padded(min(n_ctx, window + n_ubatch(choice)), _CELLS_PAD) if window else n_ctx


def n_ubatch(choice: Choice) -> int:
    """Tokens of a prompt that are computed at once."""
    return min(padded(choice.n_ctx, _CELLS_PAD) * choice.parallel, N_UBATCH)


def cell_bytes(cache: LayerCache, choice: Choice) -> int:
    """Bytes of a layer's cache for one token."""
    k, v = TENSOR_TYPES[choice.type_k.upper()], TENSOR_TYPES[choice.type_v.upper()]
    return k.nbytes(cache.k) + v.nbytes(cache.v) + k.nbytes(cache.index)


def cache_bytes(cache: LayerCache, choice: Choice) -> int:
    """Bytes of a layer's KV cache and recurrent state, for all slots."""
    return choice.parallel * (cells(choice, cache.window) * cell_bytes(cache, choice) + 4 * cache.state)


def compute_bytes(facts: ModelFacts, choice: Choice) -> int:
    """The compute buffer of a device that holds layers: the widest activations at once, masks, and logits.

    Fitted to llama.cpp's own for five architectures of 27 to 671 billion weights; within 15% of each.
    """
    return n_ubatch(choice) * _activations(facts) * 4 + _mask_bytes(facts, choice) + _logit_bytes(facts, choice)


def host_compute_bytes(facts: ModelFacts, choice: Choice) -> int:
    """The compute buffer of the CPU where all layers are on devices: embeddings twice, and masks."""
    return n_ubatch(choice) * facts.n_embd * 4 * 2 + _mask_bytes(facts, choice)


def pipeline_bytes(facts: ModelFacts, choice: Choice, device: int | None) -> int:
    """What the compute buffer of a device (its index; None: the CPU's) grows by where several devices hold the whole
    model: llama.cpp then keeps every input of theirs four times, to have them work at the same time."""
    hidden, masks = n_ubatch(choice) * facts.n_embd * 4, 3 * _mask_bytes(facts, choice)
    return masks + hidden * (3 if device is None else 5 if device == 0 else 9)


def output_compute_bytes(facts: ModelFacts, choice: Choice) -> int:
    """The compute buffer of a device that holds the output and no layer."""
    return _logit_bytes(facts, choice) + choice.parallel * facts.n_embd * 4


def offload_bytes(facts: ModelFacts, n_cpu_moe: int) -> int:
    """What a device needs to compute prompts with experts that lie in RAM: one such tensor is copied at a time."""
    if not n_cpu_moe:
        return 0
    return max(facts.layers[number].largest_expert_bytes for number in facts.moe_layers[-n_cpu_moe:])


def process_bytes(facts: ModelFacts, choice: Choice, n_devices: int) -> int:
    """What the process needs beside weights, caches and compute buffers."""
    return (
        _PROCESS_BYTES
        + facts.n_vocab * _TOKEN_BYTES
        + _logit_bytes(facts, choice)
        + n_devices * _DEVICE_CONTEXT_BYTES
        + checkpoint_bytes(facts, choice) * n_checkpoints(facts, choice)
    )


def checkpoint_bytes(facts: ModelFacts, choice: Choice) -> int:
    """One context checkpoint, which llama-server keeps to go back in models with windows or recurrent layers."""
    windowed = [layer.cache for layer in facts.layers if layer.cache.window and layer.cache.k]
    states = sum(4 * layer.cache.state for layer in facts.layers)
    return states + sum(min(cache.window, choice.n_ctx) * cell_bytes(cache, choice) for cache in windowed)


def n_checkpoints(facts: ModelFacts, choice: Choice) -> int:
    """Context checkpoints of all slots that are worth their memory: one for every 8192 tokens, at most 8 a slot."""
    if not checkpoint_bytes(facts, choice):
        return 0
    return choice.parallel * max(1, min(_MOST_CHECKPOINTS, choice.n_ctx // _CHECKPOINT_TOKENS))


def mmproj_bytes(file_bytes: int) -> int:
    """An image encoder with its compute buffer; an estimate."""
    return file_bytes + max(int(file_bytes * _MMPROJ_COMPUTE), _MMPROJ_LEAST) if file_bytes else 0


def _activations(facts: ModelFacts) -> int:
    """Elements of one token that are alive at once."""
    n_used = facts.n_expert_used if facts.moe_layers else 0
    dense = max((layer.n_ff for layer in facts.layers), default=0)
    expert = max((layer.n_ff_exp for layer in facts.layers), default=0)
    widest = max((layer.cache.k + layer.cache.v for layer in facts.layers), default=0)
    # The latent cache of MLA has one head; its queries have all heads.
    is_mla = any(layer.cache.k and not layer.cache.v for layer in facts.layers)
    attention = widest * facts.n_head if is_mla else 0
    return 8 * facts.n_embd + 2 * max(dense, n_used * max(expert, facts.n_embd), attention)


def _mask_bytes(facts: ModelFacts, choice: Choice) -> int:
    """A mask in F16 for every kind of cache."""
    kinds = {layer.cache.window for layer in facts.layers if layer.cache.k}
    return sum(cells(choice, window) * n_ubatch(choice) * 2 for window in kinds)


def _logit_bytes(facts: ModelFacts, choice: Choice) -> int:
    return facts.n_vocab * choice.parallel * 4
