"""What each layer of a model keeps per token and per conversation, as llama.cpp allocates it.

Takes a GGUF's metadata, gives one :class:`LayerCache` a layer; no bytes of weights. Follows load_hparams and
create_memory of src/llama-model.cpp, src/llama-hparams.cpp, src/llama-kv-cache*.cpp, src/llama-memory-recurrent.cpp and
the load_arch_hparams of src/models/*.cpp of the pinned llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynrun.errors import DynrunError

# Far above any model; a hostile header must not make this module work or print for ever.
_MOST_LAYERS, _MOST = 4096, 1 << 40


@dataclass(frozen=True)
class LayerCache:
    """Elements of a layer's caches: ``k``, ``v`` per cell in the cache's types, ``index`` per cell in that of K
    (sparse attention's indexer), ``state`` per conversation in F32 (recurrent layers).

    ``window``: the layer sees so many tokens back and keeps no more; 0: all of the context.
    """

    k: int = 0
    v: int = 0
    index: int = 0
    state: int = 0
    window: int = 0


@dataclass(frozen=True)
class _Swa:
    """``window`` where the metadata has none; of ``period`` layers the last, or the first, sees everything."""

    window: int
    period: int
    dense_first: bool = False
    fixed: bool = False


# Architectures whose code in src/models/ sets a sliding window; a period of -1: only by a pattern in the metadata.
_SWA = {
    **dict.fromkeys(("afmoe", "cohere2", "mellum", "muse-glimmer", "olmo2"), _Swa(0, 4)),
    **dict.fromkeys(("cohere2moe", "laguna"), _Swa(0, 4, dense_first=True)),
    **dict.fromkeys(("dots3note", "gemma4", "granite_swa", "maple", "mimo2", "spark2_5", "step35"), _Swa(0, -1)),
    "deepseek4": _Swa(0, 0),
    "exaone-moe": _Swa(128, 4),
    "exaone4": _Swa(4096, 4),
    "gemma2": _Swa(4096, 2),
    "gemma3": _Swa(0, 6),
    "gemma3n": _Swa(0, 5),
    "gpt-oss": _Swa(0, 2),
    "lfm2": _Swa(0, 0),
    "llama4": _Swa(8192, 4, fixed=True),
    "plamo3": _Swa(0, 8),
    "smallthinker": _Swa(4096, 4, dense_first=True, fixed=True),
}
_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
# Hybrids that say which layers are recurrent by a list or by every how many there is an attention layer ...
_BY_INTERVAL = frozenset({"qwen3next", "qwen35", "qwen35moe", "qwen4exp", "minimax-01"})
# ... and those where a layer without KV heads is one.
_BY_HEADS = frozenset(
    {"jamba", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe", "kimi-linear"}
    | {"bailingmoe3", "kimi-k3", "glm5-next"}
)
_DSA = frozenset({"deepseek32", "glm-dsa", "glm5-next", "dots3note", "minimax-m3", "hy_v4", "qwen4exp"})
# Encoders and diffusion models keep nothing.
_NO_CACHE = frozenset(
    {"bert", "modern-bert", "jina-bert-v2", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert"}
    | {"gemma-embedding", "dream", "llada", "llada-moe", "rnd1", "wavtokenizer-dec"}
)
# Caches that only llama.cpp's own code describes well enough: what is given here is an upper estimate.
_ESTIMATED = frozenset({"deepseek4", *_DSA, "t5", "t5encoder"})


class Hyperparameters:
    """Checked access to ``ARCHITECTURE.KEY`` of a header's metadata."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.architecture = str(metadata.get("general.architecture", ""))
        self._metadata = metadata
        self.n_layer_all = self.number("block_count")
        if self.n_layer_all > _MOST_LAYERS:
            raise DynrunError(f"the header names {self.n_layer_all} layers", fix="it is damaged: download it again")
        self.n_layer = max(self.n_layer_all - self.number("nextn_predict_layers"), 0)

    def value(self, key: str) -> Any:
        """As it stands in the metadata, or None."""
        return self._metadata.get(f"{self.architecture}.{key}")

    def number(self, key: str, default: int = 0) -> int:
        """A count. Of a list (one number a layer) the first. Raises DynrunError for what is none."""
        found = self.value(key)
        if isinstance(found, list) and found:
            found = found[0]
        return default if found is None else self._checked(key, found)

    def each_layer(self, key: str, default: int | list[int]) -> list[int]:
        """One number for each layer, from one for all or a list."""
        found = self.value(key)
        if found is None:
            found = default
        if not isinstance(found, list):
            return [self._checked(key, found)] * self.n_layer_all
        numbers = [self._checked(key, value) for value in found[: self.n_layer_all]]
        return numbers + [0] * (self.n_layer_all - len(numbers))

    def _checked(self, key: str, value: Any) -> int:
        if not isinstance(value, int | float) or not 0 <= value < _MOST:
            raise DynrunError(f"{self.architecture}.{key} is {value!r:.60}", fix="it is damaged: download it again")
        return int(value)


def is_exact(architecture: str) -> bool:
    """Whether :func:`layer_caches` follows llama.cpp to the byte, rather than giving an upper estimate."""
    return architecture not in _ESTIMATED


def layer_caches(metadata: Mapping[str, Any]) -> tuple[LayerCache, ...]:
    """The caches of all layers, MTP layers (which plain decoding does not run) with none. Raises DynrunError."""
    hp = Hyperparameters(metadata)
    if hp.architecture in _NO_CACHE:
        return (LayerCache(),) * hp.n_layer_all
    recurrent, windows = _recurrent_layers(hp), _windows(hp)
    n_head = hp.each_layer("attention.head_count", 0)
    n_head_kv = hp.each_layer("attention.head_count_kv", n_head)
    attending = _attending_layers(hp, recurrent)
    state = _state_elements(hp, n_head[0] if n_head else 0)
    caches = []
    for layer in range(hp.n_layer_all):
        k, v = _attention_elements(hp, n_head, n_head_kv[layer], bool(windows[layer])) if attending[layer] else (0, 0)
        index = hp.number("attention.indexer.key_length") if k and hp.architecture in _DSA else 0
        has_state = layer < hp.n_layer and (recurrent[layer] or hp.architecture == "falcon-h1")
        caches.append(LayerCache(k, v, index, state if has_state else 0, windows[layer]))
    return tuple(caches)


def _attention_elements(hp: Hyperparameters, n_head: list[int], n_head_kv: int, windowed: bool) -> tuple[int, int]:
    """K and V elements of a cell: n_embd_k_gqa and n_embd_v_gqa; MLA keeps one latent vector as K and no V."""
    head = hp.number("embedding_length") // n_head[0] if n_head and n_head[0] else 0
    k, v = hp.number("attention.key_length", head), hp.number("attention.value_length", head)
    if windowed:
        k, v = hp.number("attention.key_length_swa", k), hp.number("attention.value_length_swa", v)
    is_mla = hp.number("attention.key_length_mla") > 0 and hp.number("attention.value_length_mla") > 0
    return k * n_head_kv, 0 if is_mla else v * n_head_kv


def _attending_layers(hp: Hyperparameters, recurrent: list[bool]) -> list[bool]:
    """Layers with a KV cache of their own: no recurrent ones, none that reuse another's, no MTP layers."""
    last = hp.n_layer
    if hp.architecture == "gemma3n":
        last = min(last, 20)
    elif hp.architecture == "gemma4":
        last = max(hp.n_layer_all - hp.number("attention.shared_kv_layers"), 0)
    n_ff = hp.each_layer("feed_forward_length", 0) if hp.architecture.startswith("nemotron_h") else [0] * hp.n_layer_all
    return [il < last and not recurrent[il] and not n_ff[il] for il in range(hp.n_layer_all)]


def _recurrent_layers(hp: Hyperparameters) -> list[bool]:
    layers = range(hp.n_layer_all)
    if hp.architecture in _RECURRENT:
        return [True for _ in layers]
    if hp.architecture in _BY_INTERVAL:
        if hp.value("attention.recurrent_layers") is not None:
            return [bool(flag) for flag in hp.each_layer("attention.recurrent_layers", 0)]
        interval = max(hp.number("full_attention_interval", 8 if hp.architecture == "minimax-01" else 4), 1)
        return [il < hp.n_layer and (il + 1) % interval != 0 for il in layers]
    if hp.architecture not in _BY_HEADS:
        return [False for _ in layers]
    heads = hp.each_layer("attention.head_count_kv", hp.each_layer("attention.head_count", 0))
    if hp.architecture.startswith("nemotron_h"):
        n_ff = hp.each_layer("feed_forward_length", 0)
        return [heads[il] == 0 and n_ff[il] == 0 for il in layers]
    return [heads[il] == 0 for il in layers]


def _state_elements(hp: Hyperparameters, n_head: int) -> int:
    """llama_hparams::n_embd_r and n_embd_s together."""
    n_embd, conv = hp.number("embedding_length"), max(hp.number("ssm.conv_kernel") - 1, 0)
    if wkv := hp.number("wkv.head_size"):
        return hp.number("token_shift_count", 2) * n_embd + n_embd * wkv
    if length := hp.number("shortconv.l_cache"):
        return n_embd * (length - 1) + hp.number("ssm.state_size") * hp.number("ssm.inner_size")
    if kda := hp.number("kda.head_dim"):
        return 3 * (conv or 3) * n_head * kda + kda * kda * n_head
    inner, states = hp.number("ssm.inner_size"), hp.number("ssm.state_size")
    if hp.architecture == "minimax-01":
        head = hp.number("attention.key_length", n_embd // n_head if n_head else 0)
        return head * head * n_head + conv * (inner + 2 * hp.number("ssm.group_count") * states)
    return conv * (inner + 2 * hp.number("ssm.group_count") * states) + states * inner


def _windows(hp: Hyperparameters) -> list[int]:
    """The sliding window of each layer; 0: it sees everything."""
    rule = _SWA.get(hp.architecture)
    found = hp.value("attention.sliding_window")
    none = [0] * hp.n_layer_all
    if rule is None or (hp.architecture == "exaone4" and hp.n_layer != 64):
        return none
    if hp.architecture == "smallthinker" and found is None:
        return none
    window = hp.number("attention.sliding_window", rule.window)
    if window == 0:
        return none
    if rule.fixed:
        window = rule.window
    pattern = hp.value("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        flags = hp.each_layer("attention.sliding_window_pattern", 0)
    else:
        period = hp.number("attention.sliding_window_pattern", max(rule.period, 0))
        flags = [int(_is_windowed(il, period, rule.dense_first)) for il in range(hp.n_layer_all)]
        if rule.period < 0:
            return none
    return [window if flags[il] and il < hp.n_layer else 0 for il in range(hp.n_layer_all)]


def _is_windowed(layer: int, period: int, dense_first: bool) -> bool:
    """llama_hparams::set_swa_pattern."""
    if period == 0:
        return True
    return layer % period != 0 if dense_first else layer % period < period - 1
