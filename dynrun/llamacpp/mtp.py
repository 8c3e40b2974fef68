"""The multi-token-prediction (MTP) blocks of a loaded model, run behind its own decodes.

Takes token sequences and the hidden states that the model's decode left, shows the nodes of the MTP graph to a tap.
Drafts nothing: logits are never looked at. Follows common_speculative_impl_draft_mtp::process of
common/speculative.cpp: the block gets token x_k at position k with the model's hidden state h_(k-1), zeros at the
start of a sequence. Which models can: the graph_mtp of src/models/*.cpp.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dynrun.errors import DynrunError
from dynrun.gguf.header import Header
from dynrun.gguf.quantizable import mtp_blocks
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.graph import Dispatcher, FindTensors, Tap
from dynrun.llamacpp.library import Ggml, llama, shared_library

States = npt.NDArray[np.float32]
# All positions are outputs here too (qwen3next's block goes on with outputs alone), and their logits take memory.
_MAX_BATCH = 256

# src/llama-ext.h is C++ and exported under the names of the Itanium ABI. Those spell out the parameters: a function
# with others has another name and is not found.
_FUNCTIONS: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
    "_Z26llama_set_embeddings_nextnP13llama_contextbb": (None, (ctypes.c_void_p, ctypes.c_bool, ctypes.c_bool)),
    "_Z26llama_get_embeddings_nextnP13llama_context": (ctypes.c_void_p, (ctypes.c_void_p,)),
    "_Z28llama_set_nextn_layer_offsetP13llama_contexti": (None, (ctypes.c_void_p, ctypes.c_int32)),
}


@dataclass(frozen=True)
class _Graph:
    """What an architecture's graph_mtp asserts (an abort of the process) and its loader does not see to.

    ``present``, ``absent``: tensors of the block; ``zero``: metadata; ``several``: whether it runs more than one block.
    """

    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()
    several: bool = False


_ALWAYS_PRESENT = ("nextn.eh_proj", "nextn.enorm", "nextn.hnorm")
_EXPERTS = _Graph(present=("ffn_gate_inp",))
_GRAPHS: Mapping[str, _Graph] = {
    "bailingmoe3": _EXPERTS,
    "cohere2moe": _EXPERTS,
    "deepseek2": _Graph(present=("ffn_gate_inp", "attn_q_a", "attn_k_b"), zero=("attention.temperature_scale",)),
    "deepseek32": _EXPERTS,
    "deepseek4": _Graph(absent=("ffn_gate_tid2eid",)),
    "glm-dsa": _EXPERTS,
    "glm4moe": _EXPERTS,
    "hy_v3": _Graph(several=True),
    "mimo2": _Graph(present=("attn_qkv", "ffn_gate", "ffn_up", "ffn_down"), several=True),
    "nemotron_h_moe": _EXPERTS,
    "qwen35": _Graph(),
    "qwen35moe": _EXPERTS,
    "qwen3next": _EXPERTS,
    "step35": _Graph(several=True),
}


def why_not(header: Header) -> str:
    """Why the model's MTP blocks cannot be run; empty where they can, or where it has none."""
    blocks, architecture = mtp_blocks(header.metadata), header.architecture
    if not blocks:
        return ""
    graph = _GRAPHS.get(architecture)
    if graph is None:
        return f"llama.cpp has no MTP graph for {architecture}"
    if len(blocks) > 1 and not graph.several:
        return f"llama.cpp's MTP graph for {architecture} runs one block, the model has {len(blocks)}"
    if reason := _misfit(header, graph):
        return reason
    return "" if _functions() else "this build of llama.cpp exports no functions for MTP"


def _misfit(header: Header, graph: _Graph) -> str:
    names = [f"blk.{block}.{{}}.weight" for block in mtp_blocks(header.metadata)]
    for part in (*_ALWAYS_PRESENT, *graph.present):
        if missing := [name.format(part) for name in names if name.format(part) not in header.tensors]:
            return f"{missing[0]} is missing"
    for part in graph.absent:
        if found := [name.format(part) for name in names if name.format(part) in header.tensors]:
            return f"llama.cpp's MTP graph has no place for {found[0]}"
    for key in graph.zero:
        if value := header.metadata.get(f"{header.architecture}.{key}"):
            return f"llama.cpp's MTP graph for {header.architecture} takes no {key}, here {value}"
    return ""


@cache
def _functions() -> tuple[Callable[..., Any], ...]:
    """Those of :data:`_FUNCTIONS`; none where one is missing (other compilers give other names)."""
    llama()
    library = ctypes.CDLL(str(shared_library(installation().bin, "llama")))
    found = []
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            return ()
        function.restype, function.argtypes = result, arguments
        found.append(function)
    return tuple(found)


class MtpRunner:
    """The MTP blocks of one loaded model, in a context of their own. Make it with :meth:`open`."""

    def __init__(self, model: Any, main: Any, context: Any, dispatcher: Dispatcher) -> None:
        self._llama = llama()
        self._set_states, self._get_states, self._set_head = _functions()
        self._main, self._context, self._dispatcher = main, context, dispatcher
        self._n_batch: int = self._llama.llama_n_batch(context)
        self._width: int = self._llama.llama_model_n_embd_out(model)
        self._n_heads: int = self._llama.llama_model_n_layer_nextn(model)

    @classmethod
    def open(cls, model: Any, main: Any, settings: Any, dispatcher: Dispatcher) -> Self | None:
        """``model`` was loaded with its MTP blocks and :func:`why_not` had nothing to say; ``main`` is its context,
        made with ``settings``. None where llama.cpp makes no second one."""
        lib = llama()
        own = type(settings).from_buffer_copy(settings)
        own.ctx_type, own.ctx_other = lib.LLAMA_CONTEXT_TYPE_MTP, main
        own.n_batch = own.n_ubatch = min(settings.n_batch, _MAX_BATCH)
        context = lib.llama_init_from_model(model, own)
        return cls(model, main, context, dispatcher) if context else None

    def close(self) -> None:
        """Free the context."""
        if self._context is not None:
            self._llama.llama_free(self._context)
            self._context = None

    @contextmanager
    def states_kept(self) -> Iterator[None]:
        """Have decodes of the main context keep the hidden states that MTP blocks start from."""
        self._set_states(self._main, True, False)
        try:
            yield
        finally:
            self._set_states(self._main, False, False)

    def states(self, n_tokens: int) -> States:
        """A copy of the states [n_tokens, width] that the last decode kept, in the order of its batch."""
        pointer = self._get_states(self._main)
        if not pointer:
            raise DynrunError("llama.cpp kept no hidden states for the MTP blocks")
        flat = (ctypes.c_float * (n_tokens * self._width)).from_address(pointer)
        return np.array(flat, dtype=np.float32).reshape(n_tokens, self._width)

    def run(self, batch: Sequence[Sequence[int]], states: States, tap: Tap) -> None:
        """Run every MTP block on the sequences of ``batch``, whose decode left ``states``, in parts.

        As llama.cpp does with a prompt, each of several blocks gets the states of the model, not of the one before.
        """
        before, start = np.zeros_like(states), 0
        for tokens in batch:
            stop = start + len(tokens)
            before[start + 1 : stop] = states[start : stop - 1]
            start = stop
        rows = [(s, k, token) for s, tokens in enumerate(batch) for k, token in enumerate(tokens)]
        for head in range(self._n_heads):
            self._start(head)
            for first in range(0, len(rows), self._n_batch):
                last = first + self._n_batch
                self._process(rows[first:last], before[first:last], tap)

    def find(self, lib: Ggml, token: int, names: Collection[str]) -> Iterator[FindTensors]:
        """What each block's graph reads of ``names``; each by itself, for graphs may share addresses."""
        for head in range(self._n_heads):
            tap = FindTensors(lib, names)
            self._start(head)
            self._process([(0, 0, token)], np.zeros((1, self._width), dtype=np.float32), tap)
            yield tap

    def _start(self, head: int) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), False)
        self._set_head(self._context, head)

    def _process(self, rows: Sequence[tuple[int, int, int]], states: States, tap: Tap) -> None:
        """``rows``: (sequence, position, token)."""
        lib = self._llama
        batch = lib.llama_batch_ext_init(self._context)
        try:
            for (sequence, position, token), state in zip(rows, states, strict=True):
                row = lib.llama_batch_ext_add_token(batch, sequence, token)
                values = lib.llama_embd(state.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), 1, self._width)
                lib.llama_batch_ext_set_pos(batch, row, ctypes.byref(ctypes.c_int32(position)))
                lib.llama_batch_ext_set_output_logits(batch, row, True)
                # As common_batch::get does: llama_batch_ext_set_embd_state is still a stub that gives false.
                if row < 0 or not lib.llama_batch_ext_set_embd_token(batch, row, values):
                    raise DynrunError(f"llama.cpp's MTP blocks do not take token {token} at position {position}")
            with self._dispatcher.tapping(tap):
                status = lib.llama_process(self._context, lib.LLAMA_PROCESS_TYPE_DECODE, batch)
                lib.llama_synchronize(self._context)
        finally:
            lib.llama_batch_ext_free(batch)
        if status != 0:
            raise DynrunError(f"llama_process of an MTP block failed with {status}")
