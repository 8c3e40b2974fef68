"""What the planner knows of a model: bytes and elements of each layer, from its header alone.

Takes a :class:`Header` (local, remote, or of a file that is yet to be made), gives :class:`ModelFacts`. Knows no
machine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from dynrun.errors import UsageError
from dynrun.gguf.header import Header, TensorInfo
from dynrun.gguf.quant_label import label_of
from dynrun.runtime.cache_shape import Hyperparameters, LayerCache, is_exact, layer_caches

# LLM_FFN_EXPS_REGEX of common/common.h.
EXPERTS = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps")
_BLOCK = re.compile(r"blk\.(\d+)\.")
# Tensors that llama.cpp keeps in RAM whatever -ngl says: a token reads a row of them (LLM_TENSOR_LAYER_INPUT).
_INPUTS = re.compile(r"^(token_embd|token_types|position_embd|token_embd_norm|per_layer_token_embd|altup_proj_embd)\b")


@dataclass(frozen=True)
class Layer:
    """Bytes of a layer's weights: outside its experts, of its experts, of the largest tensor of experts; the elements
    of its widest activations for one token (``n_ff``: of the dense or shared FFN, ``n_ff_exp``: of one expert)."""

    dense_bytes: int
    expert_bytes: int
    largest_expert_bytes: int
    n_ff: int
    n_ff_exp: int
    cache: LayerCache


@dataclass(frozen=True)
class ModelFacts:
    """``input_bytes``: tables that stay in RAM; ``output_bytes``: the output matrix and norm; of tied embeddings a copy
    of theirs, ``output_copy_bytes``, which RAM needs not twice. ``exact``: whether the caches are llama.cpp's to the
    byte, or an upper estimate. ``type_bytes``: bytes in each tensor type."""

    name: str
    label: str
    architecture: str
    file_bytes: int
    header_bytes: int
    layers: tuple[Layer, ...]
    input_bytes: int
    input_row_bytes: int
    output_bytes: int
    output_copy_bytes: int
    n_expert: int
    n_expert_used: int
    n_vocab: int
    n_embd: int
    n_head: int
    n_ctx_train: int
    exact: bool
    type_bytes: Mapping[str, int]

    @property
    def n_layer(self) -> int:
        return len(self.layers)

    @property
    def weight_bytes(self) -> int:
        """Of all tensors; a tied output counts once."""
        layers = sum(layer.dense_bytes + layer.expert_bytes for layer in self.layers)
        return layers + self.input_bytes + self.output_bytes - self.output_copy_bytes

    @cached_property
    def main_type(self) -> str:
        """The tensor type that most bytes are in."""
        return max(self.type_bytes, key=lambda name: self.type_bytes[name])

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """The numbers of the layers that have experts."""
        return tuple(number for number, layer in enumerate(self.layers) if layer.expert_bytes)


def facts_of(header: Header, name: str | None = None) -> ModelFacts:
    """Raises UsageError for a GGUF that is no language model, DynrunError for metadata that make no sense."""
    hp = Hyperparameters(header.metadata)
    embeddings = header.tensors.get("token_embd.weight")
    if not hp.architecture or embeddings is None or not hp.n_layer_all or len(embeddings.shape) != 2:
        raise UsageError(f"{header.path} holds no language model", fix="give a GGUF of a model")
    blocks: list[list[TensorInfo]] = [[] for _ in range(hp.n_layer_all)]
    inputs: list[TensorInfo] = []
    outputs: list[TensorInfo] = []
    for tensor in header.tensors.values():
        match = _BLOCK.match(tensor.name)
        if match and int(match[1]) < len(blocks):
            blocks[int(match[1])].append(tensor)
        else:
            (inputs if _INPUTS.match(tensor.name) else outputs).append(tensor)
    copied = 0 if "output.weight" in header.tensors else embeddings.nbytes
    caches = layer_caches(header.metadata)
    n_head = hp.each_layer("attention.head_count", 0)
    return ModelFacts(
        name=name or header.path.stem,
        label=label_of(header),
        architecture=hp.architecture,
        file_bytes=header.file_bytes,
        header_bytes=header.data_offset,
        # llama.cpp does not load MTP blocks where it does not draft with them.
        layers=tuple(_layer(blocks[i] if i < hp.n_layer else [], caches[i]) for i in range(hp.n_layer_all)),
        input_bytes=_sum(inputs),
        input_row_bytes=sum(t.nbytes // max(t.n_elements // t.shape[0], 1) for t in inputs),
        output_bytes=_sum(outputs) + copied,
        output_copy_bytes=copied,
        n_expert=hp.number("expert_count"),
        n_expert_used=hp.number("expert_used_count"),
        n_vocab=embeddings.shape[1],
        n_embd=embeddings.shape[0],
        n_head=max(n_head, default=0),
        n_ctx_train=hp.number("context_length"),
        exact=is_exact(hp.architecture),
        type_bytes=_type_bytes(header.tensors.values()),
    )


def _layer(tensors: Iterable[TensorInfo], cache: LayerCache) -> Layer:
    experts: list[TensorInfo] = []
    dense: list[TensorInfo] = []
    for tensor in tensors:
        (experts if EXPERTS.search(tensor.name) else dense).append(tensor)
    wide = [t.shape[1] for t in dense if len(t.shape) > 1 and ".ffn_" in t.name and "inp" not in t.name]
    # Two vectors of the inner size in one; three of them are alive at once.
    wide += [t.shape[1] * 2 // 3 for t in dense if len(t.shape) > 1 and ".ssm_in." in t.name]
    inner = [t.shape[0] if "down" in t.name else t.shape[1] for t in experts if len(t.shape) > 1]
    return Layer(
        dense_bytes=_sum(dense),
        expert_bytes=_sum(experts),
        largest_expert_bytes=max((t.nbytes for t in experts), default=0),
        n_ff=max(wide, default=0),
        n_ff_exp=max(inner, default=0),
        cache=cache,
    )


def _sum(tensors: Iterable[TensorInfo]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _type_bytes(tensors: Iterable[TensorInfo]) -> dict[str, int]:
    found = Counter[str]()
    for tensor in tensors:
        found[tensor.type] += tensor.nbytes
    return dict(found)
