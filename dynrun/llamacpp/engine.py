"""A model loaded in this process: tokens to logits, inputs of weights, replace a weight, restore it.

Works on any backend through ggml_backend_tensor_get/set. Each call decodes sequences from an empty memory: nothing
leaks from one to the next, nor between sequences that share a batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dynrun.errors import DynrunError
from dynrun.gguf.header import read_header
from dynrun.gguf.quantizable import is_mtp, mtp_blocks
from dynrun.llamacpp.graph import (
    Activation,
    Dispatcher,
    LayerOutput,
    Node,
    Record,
    Resume,
    Silence,
    Tap,
    WatchInputs,
    layer_node,
    skippable,
)
from dynrun.llamacpp.library import ggml, llama
from dynrun.llamacpp.mtp import MtpRunner, why_not
from dynrun.llamacpp.vocabulary import LlamaLog, Vocabulary, load_model
from dynrun.llamacpp.weights import FindCopies, Weight, described, is_finite

Logits = npt.NDArray[np.float32]
Tokens = Sequence[int]


@dataclass(frozen=True)
class Piece:
    """``tokens`` to go on with in one sequence, from position ``start``; logits after those at ``outputs`` (from 0)."""

    sequence: int
    start: int
    tokens: Tokens
    outputs: tuple[int, ...]


@dataclass
class Prefix:
    """What one sequence's decode left at every layer's end: enough to go on from any of them."""

    tokens: tuple[int, ...]
    outputs: tuple[int, ...]
    nodes: list[Node]
    values: dict[str, npt.NDArray[np.uint8]]


class Engine(Vocabulary):
    """Open with :meth:`open`, use as a context manager. Not thread-safe: one decode at a time.

    ``mtp_missing``: why the model's MTP blocks are not run; empty where they are, or where it has none.
    """

    def __init__(
        self,
        path: Path,
        model: Any,
        context: Any,
        dispatcher: Dispatcher,
        keep_alive: tuple[Any, ...],
        mtp: MtpRunner | None = None,
        mtp_missing: str = "",
        fixed: bool = False,
    ):
        super().__init__(path, model, keep_alive)
        self._ggml = ggml()
        self._opened, self._dispatcher = context, dispatcher
        self._mtp, self.mtp_missing = mtp, mtp_missing
        self.n_ctx: int = self._llama.llama_n_ctx(context)
        self.n_batch: int = self._llama.llama_n_batch(context)
        self.n_seq_max: int = self._llama.llama_n_seq_max(context)
        self._fixed, self._repeats = fixed, False
        self._found = None if fixed else self._find_weights()

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        n_ctx: int,
        n_threads: int,
        n_gpu_layers: int = -1,
        n_seq_max: int = 1,
        mtp: bool = False,
        device: str = "",
        n_batch: int | None = None,
        fixed: bool = False,
    ) -> Self:
        """Load a GGUF; ``n_ctx`` tokens in up to ``n_seq_max`` sequences, ``n_batch`` (or all) of them in one decode.

        ``fixed`` weights are mapped, not copied into memory of their own, and cannot be written. With ``mtp`` the MTP
        blocks too, which only :meth:`watch_inputs` runs. With ``device`` on that one alone (``CUDA0``, ``CPU``,
        ``rpc:HOST:PORT``: devices.py), else on all GPUs there are. Raises NotFoundError for a missing file, UsageError
        for an unknown device, NetworkError where an RPC server does not answer, DynrunError where llama.cpp refuses the
        file.
        """
        model, log, has_mtp, mtp_missing = _load(path, n_gpu_layers, mtp, device, fixed)
        lib, dispatcher = llama(), Dispatcher()
        callback = lib.ggml_backend_sched_eval_callback(dispatcher)
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch = n_ctx, n_batch or n_ctx
        settings.n_ubatch = settings.n_batch
        settings.n_threads = settings.n_threads_batch = n_threads
        # One cache for all sequences: each may be as long as the whole batch.
        settings.n_seq_max, settings.kv_unified = n_seq_max, True
        settings.no_perf, settings.cb_eval = True, callback
        context = lib.llama_init_from_model(model, settings)
        if not context:
            lib.llama_model_free(model)
            raise DynrunError(f"no context of {n_ctx} tokens for {path}: {log.last_error()}", fix="free some memory")
        runner = MtpRunner.open(model, context, settings, dispatcher) if has_mtp else None
        if has_mtp and runner is None:
            mtp_missing = f"llama.cpp makes no context for the MTP blocks: {log.last_error()}"
        return cls(path, model, context, dispatcher, (callback, log), runner, mtp_missing, fixed)

    def close(self) -> None:
        """Free the model."""
        if self._mtp is not None:
            self._mtp.close()
            self._mtp = None
        if self._opened is not None:
            self._llama.llama_free(self._opened)
            self._opened = None
        super().close()

    @property
    def _context(self) -> Any:
        """llama.cpp's pointer, which must not be used once it is freed."""
        if self._opened is None:
            raise ValueError(f"{self.path} is closed")
        return self._opened

    # -- logits ----------------------------------------------------------------------------------------------------

    def logits(self, tokens: Tokens, outputs: Sequence[int] | None = None) -> Logits:
        """Logits [n_outputs, n_vocab] after each position in ``outputs`` (all of them by default).

        Raises ValueError for an empty or too long sequence, and for positions that it does not have.
        """
        chosen = tuple(range(len(tokens))) if outputs is None else tuple(outputs)
        return self._decode([tokens], chosen)

    def logit_blocks(self, tokens: Tokens, outputs: Sequence[int], n_rows: int) -> Iterator[Logits]:
        """What :meth:`logits` gives, ``n_rows`` tokens a decode; ``outputs`` ascend. Memory is bounded by ``n_rows``.

        A block lies in llama.cpp's own memory: it is gone when the next one is asked for.
        """
        self.forget()
        _check_outputs(outputs, len(tokens))
        for start in range(0, len(tokens), n_rows):
            wanted = tuple(position - start for position in outputs if start <= position < start + n_rows)
            self._decode_pieces([Piece(0, start, tokens[start : start + n_rows], wanted)])
            if wanted:
                yield self._rows(len(wanted))

    def forget(self, *, erase: bool = False) -> None:
        """Empty the memory of all sequences; with ``erase`` what layers read that share another's cache is zero too."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), erase)

    def extend(self, pieces: Sequence[Piece]) -> Logits:
        """Go on from what is in memory; logits of all pieces' outputs, in order.

        Raises ValueError for an empty or too long batch.
        """
        self._decode_pieces(pieces)
        return np.array(self._rows(sum(len(piece.outputs) for piece in pieces)))

    def tapped(self, tokens: Tokens, tap: Tap) -> None:
        """Decode ``tokens`` from an empty memory with ``tap`` called at each node."""
        self.forget()
        for start in range(0, len(tokens), self.n_batch):
            piece = tokens[start : start + self.n_batch]
            self._decode_pieces([Piece(0, start, piece, tuple(range(len(piece))))], tap)

    def watch_inputs(
        self,
        batch: Sequence[Tokens],
        consume: Callable[[Activation], None],
        only: Collection[str] | None = None,
        *,
        start: LayerOutput | None = None,
        keep: int | None = None,
    ) -> LayerOutput | None:
        """Decode the sequences of ``batch`` together and give the inputs of the weights to ``consume``.

        Each input once, under the name of the first weight that reads it (:attr:`input_of`); with ``only`` the inputs
        of these names alone, and nothing is computed behind the last of them. Rows are the positions of all sequences,
        one after another. MTP blocks run after the decode, their inputs come in several parts.

        Gives the output of layer ``keep`` where it can be had; as ``start`` of the same batch it saves what leads to
        it, if the model can do that (calibration/relay.py).
        """
        names = {w.pointer: n for n, w in self.weights.items() if self.input_of.get(n) == n}
        if only is not None:
            names = {pointer: name for pointer, name in names.items() if name in only}
        heads = {pointer: name for pointer, name in names.items() if is_mtp(name, self.header.metadata)}
        # All positions are outputs, or the last layer would see only some.
        n_tokens = sum(len(tokens) for tokens in batch)
        outputs, once = tuple(range(n_tokens)), not (heads or self._repeats)
        tap = WatchInputs(self._ggml, names, consume, n_tokens=n_tokens if once else 0, keep=keep)
        behind = tap if start is None else self._behind(start, batch, outputs, tap)
        if self._mtp is None or not heads:
            self._decode(batch, outputs, behind, copy=False)
            return tap.kept
        with self._mtp.states_kept():
            self._decode(batch, outputs, behind, copy=False)
            states = self._mtp.states(n_tokens)
        # Only what the MTP blocks own: they end in the model's output.weight too, whose statistics (and so its
        # rounding) are to serve the answers that are given, not the drafts, nor count every token twice.
        self._mtp.run(batch, states, WatchInputs(self._ggml, heads, consume))
        return tap.kept

    def _behind(self, start: LayerOutput, batch: Sequence[Tokens], outputs: tuple[int, ...], tap: Tap) -> Tap:
        """``tap`` on what is behind ``start``; on everything where the graph has no such layer, or comes in parts."""
        graph, cut = Silence(self._ggml), layer_node(start.layer)
        self._decode(batch, outputs, graph, copy=False)
        if [node.name for node in graph.nodes].count(cut) != 1:
            return tap
        return Resume(self._ggml, graph.nodes, skippable(graph.nodes, cut), cut, start.value, tap)

    def record(self, tokens: Tokens, outputs: Sequence[int]) -> tuple[Prefix, Logits]:
        """Decode and keep every layer's output, so that :meth:`resume` can start at any layer."""
        tap = Record(self._ggml, lambda name: re.fullmatch(r"l_out-\d+", name) is not None)
        logits = self._decode([tokens], tuple(outputs), tap)
        return Prefix(tuple(tokens), tuple(outputs), tap.nodes, tap.values), logits

    def resume(self, prefix: Prefix, layer: int) -> Logits:
        """Logits of the recorded sequence with layers up to and including ``layer`` taken from the record.

        ``layer`` -1, or one that was not recorded, decodes everything.
        """
        cut = layer_node(layer)
        if cut not in prefix.values:
            return self._decode([prefix.tokens], prefix.outputs)
        skip = skippable(prefix.nodes, cut)
        tap = Resume(self._ggml, prefix.nodes, skip, cut, prefix.values[cut])
        return self._decode([prefix.tokens], prefix.outputs, tap)

    def _decode(
        self, sequences: Sequence[Tokens], outputs: tuple[int, ...], tap: Tap | None = None, *, copy: bool = True
    ) -> Logits:
        """``outputs`` count through all sequences; so do the rows of the result."""
        self.forget()
        _check_outputs(outputs, sum(map(len, sequences)))
        pieces, start = [], 0
        for i, tokens in enumerate(sequences):
            here = tuple(sorted(position - start for position in outputs if start <= position < start + len(tokens)))
            pieces.append(Piece(i, 0, tokens, here))
            start += len(tokens)
        self._decode_pieces(pieces, tap)
        if not copy:
            return self._rows(0)
        order = np.argsort(np.argsort(outputs)) if list(outputs) != sorted(outputs) else slice(None)
        return np.array(self._rows(len(outputs))[order])

    def _decode_pieces(self, pieces: Sequence[Piece], tap: Tap | None = None) -> None:
        n_tokens = sum(len(piece.tokens) for piece in pieces)
        if not all(len(piece.tokens) for piece in pieces) or not 0 < n_tokens <= self.n_batch:
            raise ValueError(f"a batch of {n_tokens} tokens; this engine takes 1 to {self.n_batch}, no empty sequence")
        if not all(0 <= piece.sequence < self.n_seq_max for piece in pieces):
            raise ValueError(f"{len(pieces)} sequences; this engine takes {self.n_seq_max}")
        for piece in pieces:
            _check_outputs(piece.outputs, len(piece.tokens))
            if not all(0 <= token < self.n_vocab for token in piece.tokens):
                raise ValueError(f"a token that is none of {self.n_vocab}")
        lib = self._llama
        batch = lib.llama_batch_init(n_tokens, 0, 1)
        try:
            _fill(batch, pieces)
            with self._dispatcher.tapping(tap):
                status = lib.llama_decode(self._context, batch)
                lib.llama_synchronize(self._context)
        finally:
            lib.llama_batch_free(batch)
        if status != 0:
            raise DynrunError(f"llama_decode failed with {status} on {self.path}")

    def _rows(self, n: int) -> Logits:
        """llama.cpp's own memory: rows of the positions asked for in the last decode, in the order of its batch."""
        if not n:
            return np.empty((0, self.n_vocab), dtype=np.float32)
        flat = np.ctypeslib.as_array(self._llama.llama_get_logits(self._context), (n * self.n_vocab,))
        return flat.reshape(n, self.n_vocab)

    # -- weights ---------------------------------------------------------------------------------------------------

    def _find_weights(self) -> tuple[dict[str, Weight], Mapping[str, str]]:
        """Decode one token and look at what every node reads: the weights, and for each the first with its input."""
        first = self.bos if self.bos >= 0 else 0
        tap = FindCopies(self._ggml, self.header.tensors)
        self._decode([[first]], (0,), tap)
        pointers, input_of, self._repeats = tap.found, tap.input_of, bool(tap.repeated)
        if self._mtp is not None:
            own = [name for name in self.header.tensors if is_mtp(name, self.header.metadata)]
            try:
                heads = list(self._mtp.find(self._ggml, first, own))
            except DynrunError as error:
                self._mtp.close()
                self._mtp, self.mtp_missing, heads = None, error.message, []
            for head in heads:
                pointers, input_of = pointers | head.found, input_of | head.input_of
        weights = {name: described(name, pointer, tap.copies.get(name, set())) for name, pointer in pointers.items()}
        return weights, input_of

    @property
    def weights(self) -> dict[str, Weight]:
        """By name; their pointers are of use until the model is freed. Raises ValueError afterwards."""
        _ = self._context  # raises where it is freed
        return self._of_weights[0]

    @property
    def input_of(self) -> Mapping[str, str]:
        """For each weight the first one that reads the same input."""
        return self._of_weights[1]

    @property
    def _of_weights(self) -> tuple[dict[str, Weight], Mapping[str, str]]:
        # Where nothing is replaced few want them, and finding them takes as long as a token.
        self._found = self._found or self._find_weights()
        return self._found

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a weight as it is now."""
        return self._ggml.tensor_bytes(self.weights[name].pointer)

    def write(self, name: str, data: npt.NDArray[Any]) -> None:
        """Have other bytes in weight ``name`` from now on. Raises ValueError for another size, and if it is fixed."""
        if self._fixed:
            raise ValueError(f"{self.path} was opened with weights that stay")
        weight = self.weights[name]
        for pointer in (weight.pointer, *weight.copies):
            self._ggml.set_tensor_bytes(pointer, data)

    @contextmanager
    def replaced(self, name: str, data: npt.NDArray[Any]) -> Iterator[None]:
        """Have other bytes in weight ``name``; afterwards it is restored, whatever happens in between.

        Raises ValueError for another size, and for NaN and infinity in a weight of full precision.
        """
        if not is_finite(data, self.weights[name].type_id):
            raise ValueError(f"values for {name} that are not finite")
        original = self.read(name)
        self.write(name, data)
        try:
            yield
        finally:
            self.write(name, original)


def _load(path: Path, n_gpu_layers: int, mtp: bool, device: str, mapped: bool) -> tuple[Any, LlamaLog, bool, str]:
    """The model, what it logs, whether its MTP blocks were loaded, and why not where it has some."""
    header = read_header(path)
    missing = why_not(header) if mtp else ""
    where: dict[str, Any] = {"n_gpu_layers": n_gpu_layers, "device": device, "mapped": mapped}
    if mtp and mtp_blocks(header.metadata) and not missing:
        try:
            return *load_model(path, **where, load_mtp=True), True, ""
        except DynrunError as error:  # the blocks may be what does not fit into memory
            missing = error.message
    return *load_model(path, **where), False, missing


def _check_outputs(outputs: Sequence[int], n_tokens: int) -> None:
    """Each is a row of logits that is read: one too many would be read from beyond them."""
    if len(set(outputs)) != len(outputs) or not all(0 <= position < n_tokens for position in outputs):
        raise ValueError(f"outputs that are not {len(outputs)} of {n_tokens} positions")


def _fill(batch: Any, pieces: Sequence[Piece]) -> None:
    i = 0
    for piece in pieces:
        outputs = set(piece.outputs)
        for j, token in enumerate(piece.tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, piece.start + j, 1
            batch.logits[i], batch.seq_id[i][0] = j in outputs, piece.sequence
            i += 1
    batch.n_tokens = i
