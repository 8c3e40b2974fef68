"""What happens at each node of a compute graph while llama.cpp decodes.

ggml_backend_sched calls back twice a node: first with ask=true for a run of nodes, before they are computed, then with
ask=false for a node whose data somebody asked for (ggml-backend.cpp, ggml_backend_sched_compute_splits). A
:class:`Tap` decides what to do there. The engine holds one at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dynrun.llamacpp.library import MAX_SRC, Ggml, GgmlTensor

Array = npt.NDArray[np.float32]
F32_TYPE = 0


class Tap:
    """Does nothing; subclasses override. ``ask`` returns whether the node's data is wanted in ``got``.

    ``done``: what is behind the node that was just got is not wanted, and need not be computed.
    """

    done: bool = False

    def ask(self, pointer: int, node: GgmlTensor) -> bool:
        return False

    def got(self, pointer: int, node: GgmlTensor) -> None:
        """The node has been computed and its successors have not."""

    def finish(self) -> None:
        """The decode is over, even if it failed."""


def sources(node: GgmlTensor) -> list[int]:
    """Pointers of the tensors that a node reads."""
    found: list[int] = [node.src[i] for i in range(MAX_SRC) if node.src[i]]
    if node.view_src:
        found.append(node.view_src)
    return found


class Silenced:
    """Nodes that compute nothing until they are restored: llama.cpp may use the same graph for the next decode."""

    def __init__(self, lib: Ggml) -> None:
        self._none = lib.ops["NONE"]
        self._nodes: list[tuple[GgmlTensor, int]] = []

    def add(self, node: GgmlTensor) -> None:
        self._nodes.append((node, node.op))
        node.op = self._none

    def restore(self) -> None:
        while self._nodes:
            node, op = self._nodes.pop()
            node.op = op


class FindTensors(Tap):
    """Collect the pointer of every named leaf (weights among them) of the graph.

    ``input_of[weight]``: the first weight in the graph that multiplies the same input (and, for experts, by the same
    routing), itself where none did before. Holds the weights of MUL_MAT and MUL_MAT_ID with an F32 input.
    """

    def __init__(self, lib: Ggml, names: Iterable[str]) -> None:
        self.wanted = set(names)
        self.found: dict[str, int] = {}
        self.input_of: dict[str, str] = {}
        self._multiplies = {lib.ops["MUL_MAT"], lib.ops["MUL_MAT_ID"]}
        self._first: dict[tuple[int, int | None], str] = {}
        self.repeated: set[str] = set()

    def ask(self, pointer: int, node: GgmlTensor) -> bool:
        for source in sources(node):
            name = GgmlTensor.from_address(source).name.decode("utf-8", "replace")
            if name in self.wanted:
                self.found[name] = source
        if node.op in self._multiplies:
            self._note_input(node)
        return False

    def _note_input(self, node: GgmlTensor) -> None:
        name = GgmlTensor.from_address(node.src[0]).name.decode("utf-8", "replace")
        if name not in self.wanted or GgmlTensor.from_address(node.src[1]).type != F32_TYPE:
            return
        if name in self.input_of:
            self.repeated.add(name)
        else:
            self.input_of[name] = self._first.setdefault((node.src[1], node.src[2]), name)

    def finish(self) -> None:
        # A weight used at several places has the inputs of all of them, and speaks for no other.
        for name, first in self.input_of.items():
            if name in self.repeated or first in self.repeated:
                self.input_of[name] = name


@dataclass(frozen=True)
class Activation:
    """The input of ``weight``: ``x`` [n_rows, ne0]; ``experts`` [n_rows] for expert tensors, else None."""

    weight: str
    x: Array
    experts: npt.NDArray[np.int32] | None


@dataclass(frozen=True)
class LayerOutput:
    """What ``layer`` made of one batch: the bytes of its node in the graph (``l_out-N``, F32 [n_tokens, n_embd])."""

    layer: int
    value: npt.NDArray[np.uint8]


class WatchInputs(Tap):
    """Give the F32 input of every multiplication with a known weight to ``consume``.

    As llama-imatrix does (tools/imatrix/imatrix.cpp, collect_imatrix): MUL_MAT and MUL_MAT_ID, weight in src[0].
    The logits themselves are not computed: a small model spends a quarter of its time on them. Nor is anything behind
    the last of the inputs, once ``n_tokens`` rows of each have come (0: they may come again). ``keep``: a layer whose
    output is kept.
    """

    def __init__(
        self,
        lib: Ggml,
        weights: dict[int, str],
        consume: Callable[[Activation], None],
        *,
        n_tokens: int = 0,
        keep: int | None = None,
    ) -> None:
        self.lib, self.weights, self.consume = lib, weights, consume
        self.dense, self.routed = lib.ops["MUL_MAT"], lib.ops["MUL_MAT_ID"]
        self._logits = Silenced(lib)
        self._n_tokens, self._missing = n_tokens, dict.fromkeys(weights.values(), n_tokens)
        self._keep, self._kept = layer_node(keep).encode(), list[npt.NDArray[np.uint8]]()
        self._layer = keep

    @property
    def kept(self) -> LayerOutput | None:
        """The output of the layer to keep; None where the graph has none, or came in parts."""
        return LayerOutput(self._layer, self._kept[0]) if self._layer is not None and len(self._kept) == 1 else None

    def ask(self, pointer: int, node: GgmlTensor) -> bool:
        if node.op == self.dense and node.name == b"result_output":
            self._logits.add(node)
            return True
        if self._keep and node.name == self._keep:
            return True
        if node.op not in (self.dense, self.routed) or node.src[0] not in self.weights:
            return False
        # Of the batch's next part.
        self.done = False
        return bool(GgmlTensor.from_address(node.src[1]).type == F32_TYPE)

    def finish(self) -> None:
        self._logits.restore()

    def got(self, pointer: int, node: GgmlTensor) -> None:
        # At once: llama.cpp may use the same graph again, or its memory for the graph of the batch's next part.
        self.finish()
        if self._keep and node.name == self._keep:
            self._kept.append(self.lib.tensor_bytes(pointer))
        elif node.src[0] in self.weights:
            name = self.weights[node.src[0]]
            self._missing[name] -= self._consumed(name, node)
        self.done = (
            self._n_tokens > 0 and not (self._keep and not self._kept) and max(self._missing.values(), default=0) <= 0
        )

    def _consumed(self, name: str, node: GgmlTensor) -> int:
        """Tokens whose input was given away."""
        x = strided(self.lib, node.src[1])
        if node.op != self.routed:
            rows = x.reshape(-1, x.shape[-1])
            self.consume(Activation(name, rows, None))
            return len(rows)
        # x: [n_tokens, n_used or 1, ne0]; ids: [n_tokens, n_used]
        ids = strided(self.lib, node.src[2], np.int32)[0, 0]
        rows = np.broadcast_to(x[0], (*ids.shape, x.shape[-1]))
        self.consume(Activation(name, rows.reshape(-1, x.shape[-1]), ids.reshape(-1)))
        return len(ids)


def layer_node(layer: int | None) -> str:
    """The name of a layer's output in the graph; empty for None."""
    return "" if layer is None else f"l_out-{layer}"


def strided(lib: Ggml, pointer: int, dtype: type[Any] = np.float32) -> npt.NDArray[Any]:
    """A tensor of 4-byte elements as an array [ne3, ne2, ne1, ne0], honouring its strides."""
    tensor = GgmlTensor.from_address(pointer)
    shape = tuple(reversed(list(tensor.ne)))
    strides = tuple(reversed(list(tensor.nb)))
    return np.ndarray(shape, dtype=dtype, buffer=lib.tensor_bytes(pointer).data, strides=strides)


@dataclass
class Node:
    """One node of a recorded graph."""

    pointer: int
    name: str
    sources: list[int]


class Record(Tap):
    """Record the order and dependencies of the graph and keep the values of ``keep`` nodes."""

    def __init__(self, lib: Ggml, keep: Callable[[str], bool]) -> None:
        self.lib, self.keep = lib, keep
        self.nodes: list[Node] = []
        self.values: dict[str, npt.NDArray[np.uint8]] = {}

    def ask(self, pointer: int, node: GgmlTensor) -> bool:
        name = node.name.decode("utf-8", "replace")
        self.nodes.append(Node(pointer, name, sources(node)))
        return self.keep(name)

    def got(self, pointer: int, node: GgmlTensor) -> None:
        self.values[node.name.decode("utf-8", "replace")] = self.lib.tensor_bytes(pointer)


def skippable(nodes: Sequence[Node], cut: str) -> frozenset[int]:
    """Indices of nodes whose work is not needed when the value of node ``cut`` is given.

    Needed are the nodes that depend on the cut and what those read by other ways (masks, positions). All others
    only lead to the cut, or write caches of layers before it.
    """
    index = {node.pointer: i for i, node in enumerate(nodes)}
    cut_index = next(i for i, node in enumerate(nodes) if node.name == cut)
    after: set[int] = {cut_index}
    for i in range(cut_index + 1, len(nodes)):
        if any(index.get(source) in after for source in nodes[i].sources):
            after.add(i)
    needed, todo = set(after), [i for i in after if i != cut_index]
    while todo:
        for source in nodes[todo.pop()].sources:
            read = index.get(source)
            if read is not None and read not in needed:
                needed.add(read)
                todo.append(read)
    return frozenset(range(len(nodes))) - frozenset(needed)


class Silence(Record):
    """Record the graph of a batch, and compute nothing of it."""

    def __init__(self, lib: Ggml) -> None:
        super().__init__(lib, lambda _: False)
        self._silenced = Silenced(lib)

    def ask(self, pointer: int, node: GgmlTensor) -> bool:
        self._silenced.add(node)
        return super().ask(pointer, node)

    def finish(self) -> None:
        self._silenced.restore()


@dataclass
class Resume(Tap):
    """Skip the nodes in ``skip`` and put ``value`` in the place of node ``cut``; ``inner`` sees all others."""

    lib: Ggml
    nodes: Sequence[Node]
    skip: frozenset[int]
    cut: str
    value: npt.NDArray[np.uint8]
    inner: Tap = field(default_factory=Tap)
    _next: int = 0

    def __post_init__(self) -> None:
        self._silenced = Silenced(self.lib)

    def ask(self, pointer: int, node: GgmlTensor) -> bool:
        if self.done:
            # Some nodes were left out: those of other backends would not be where they are expected.
            return False
        index, self._next = self._next, self._next + 1
        if index >= len(self.nodes) or self.nodes[index].name != node.name.decode("utf-8", "replace"):
            raise RuntimeError(f"the graph changed at node {index}: {node.name!r}")
        is_cut = self.nodes[index].name == self.cut
        if index in self.skip or is_cut:
            self._silenced.add(node)
            return is_cut
        return self.inner.ask(pointer, node)

    def got(self, pointer: int, node: GgmlTensor) -> None:
        if node.name.decode("utf-8", "replace") == self.cut:
            self.lib.set_tensor_bytes(pointer, self.value)
        else:
            self.inner.got(pointer, node)
            self.done = self.inner.done

    def finish(self) -> None:
        self._silenced.restore()
        self.inner.finish()


class Dispatcher:
    """The C callback of contexts; forwards to the current tap and keeps an exception raised there."""

    def __init__(self) -> None:
        self.tap: Tap | None = None
        self.error: BaseException | None = None

    @contextmanager
    def tapping(self, tap: Tap | None) -> Iterator[None]:
        """Have ``tap`` called during one decode; an exception raised there is raised at the end."""
        self.tap, self.error = tap, None
        try:
            yield
        finally:
            self.tap = None
            if tap is not None:
                tap.finish()
        if self.error is not None:
            raise self.error

    def __call__(self, pointer: int, ask: bool, _: ctypes.c_void_p) -> bool:
        if self.tap is None or self.error is not None:
            return False
        try:
            node = GgmlTensor.from_address(pointer)
            if ask:
                return self.tap.ask(pointer, node)
            self.tap.got(pointer, node)
            return not self.tap.done
        except BaseException as error:  # an exception must not cross C code; the engine raises it after the decode
            self.error = error
            return False
