"""A model loaded in this process: tokens to logits, inputs of weights, replace a weight, restore it.

Works on any backend through ggml_backend_tensor_get/set. Each call decodes sequences from an empty memory: nothing
leaks from one to the next.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dynrun.errors import DynrunError, NotFoundError
from dynrun.gguf.header import read_header
from dynrun.llamacpp.graph import (
    Activation,
    Dispatcher,
    FindTensors,
    Node,
    Record,
    Resume,
    Tap,
    WatchInputs,
    skippable,
)
from dynrun.llamacpp.library import GgmlTensor, ggml, llama

Logits = npt.NDArray[np.float32]
Tokens = Sequence[int]


@dataclass(frozen=True)
class Weight:
    """A weight of the loaded model: ggml type id and ``shape`` in ggml order [ne0, ne1, ...]."""

    name: str
    pointer: int
    type_id: int
    shape: tuple[int, ...]


@dataclass
class Prefix:
    """What one sequence's decode left at every layer's end: enough to go on from any of them."""

    tokens: tuple[int, ...]
    outputs: tuple[int, ...]
    nodes: list[Node]
    values: dict[str, npt.NDArray[np.uint8]]


class Engine:
    """Open with :meth:`open`, use as a context manager. Not thread-safe: one decode at a time."""

    def __init__(self, path: Path, model: Any, context: Any, dispatcher: Dispatcher, keep_alive: tuple[Any, ...]):
        self.path = path
        self.header = read_header(path)
        self._llama, self._ggml = llama(), ggml()
        self._model, self._context, self._dispatcher, self._keep_alive = model, context, dispatcher, keep_alive
        self._vocab = self._llama.llama_model_get_vocab(model)
        self.n_vocab: int = self._llama.llama_vocab_n_tokens(self._vocab)
        self.n_ctx: int = self._llama.llama_n_ctx(context)
        self.n_batch: int = self._llama.llama_n_batch(context)
        self.weights = self._find_weights()

    @classmethod
    def open(cls, path: Path, *, n_ctx: int, n_threads: int, n_gpu_layers: int = -1) -> Self:
        """Load a GGUF. Raises NotFoundError for a missing file, DynrunError where llama.cpp refuses it."""
        if not path.is_file():
            raise NotFoundError(f"{path} does not exist", fix="check the path")
        read_header(path)
        lib = llama()
        log = _Log(lib)
        params = lib.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        # Weights must lie in memory of their own, in their own layout, to be replaced in place.
        params.load_mode, params.use_extra_bufts = lib.LLAMA_LOAD_MODE_NONE, False
        model = lib.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise DynrunError(
                f"llama.cpp cannot load {path}: {log.last_error()}", fix="see `dynrun lint` or fetch it again"
            )
        dispatcher = Dispatcher()
        callback = lib.ggml_backend_sched_eval_callback(dispatcher)
        settings = lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = n_ctx
        settings.n_threads = settings.n_threads_batch = n_threads
        settings.n_seq_max, settings.no_perf, settings.cb_eval = 1, True, callback
        context = lib.llama_init_from_model(model, settings)
        if not context:
            lib.llama_model_free(model)
            raise DynrunError(f"no context of {n_ctx} tokens for {path}: {log.last_error()}", fix="free some memory")
        return cls(path, model, context, dispatcher, (callback, log))

    def close(self) -> None:
        """Free the model."""
        if self._context is not None:
            self._llama.llama_free(self._context)
            self._llama.llama_model_free(self._model)
            self._context = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- text ------------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, parse_special: bool = True, add_special: bool = False) -> list[int]:
        """Token ids of ``text``; special tokens in it are parsed unless told otherwise."""
        data = text.encode()
        size = len(data) + 16
        buffer = (self._llama.llama_token * size)()
        n = self._llama.llama_tokenize(self._vocab, data, len(data), buffer, size, add_special, parse_special)
        if n < 0:
            raise DynrunError(f"{self.path} cannot tokenize a text of {len(data)} bytes")
        return list(buffer[:n])

    def piece(self, token: int) -> bytes:
        """The bytes of one token, special tokens as text."""
        buffer = ctypes.create_string_buffer(512)
        n = self._llama.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(n, 0)]

    def token_text(self, key: str) -> str:
        """The text of the token that a metadata key names; empty where there is none."""
        token = self.header.metadata.get(key)
        return self.piece(token).decode("utf-8", "replace") if isinstance(token, int) else ""

    @property
    def adds_bos(self) -> bool:
        """Whether the vocabulary wants a BOS token at the start of a sequence."""
        return bool(self._llama.llama_vocab_get_add_bos(self._vocab))

    @property
    def bos(self) -> int:
        return int(self._llama.llama_vocab_bos(self._vocab))

    @property
    def eog_tokens(self) -> frozenset[int]:
        """Tokens that end a generation."""
        return frozenset(t for t in range(self.n_vocab) if self._llama.llama_vocab_is_eog(self._vocab, t))

    # -- logits ----------------------------------------------------------------------------------------------------

    def logits(self, tokens: Tokens, outputs: Sequence[int] | None = None) -> Logits:
        """Logits [n_outputs, n_vocab] after each position in ``outputs`` (all of them by default).

        Raises ValueError for an empty or too long sequence.
        """
        chosen = tuple(range(len(tokens))) if outputs is None else tuple(outputs)
        return self._decode(tokens, chosen)

    def watch_inputs(self, tokens: Tokens, consume: Callable[[Activation], None]) -> None:
        """Decode ``tokens`` and give the input of every weight multiplication to ``consume``."""
        names = {weight.pointer: name for name, weight in self.weights.items()}
        # All positions are outputs, or the last layer would see only some.
        self._decode(tokens, tuple(range(len(tokens))), WatchInputs(self._ggml, names, consume), copy=False)

    def record(self, tokens: Tokens, outputs: Sequence[int]) -> tuple[Prefix, Logits]:
        """Decode and keep every layer's output, so that :meth:`resume` can start at any layer."""
        tap = Record(self._ggml, lambda name: re.fullmatch(r"l_out-\d+", name) is not None)
        logits = self._decode(tokens, tuple(outputs), tap)
        return Prefix(tuple(tokens), tuple(outputs), tap.nodes, tap.values), logits

    def resume(self, prefix: Prefix, layer: int) -> Logits:
        """Logits of the recorded sequence with layers up to and including ``layer`` taken from the record.

        ``layer`` -1, or one that was not recorded, decodes everything.
        """
        cut = f"l_out-{layer}"
        if cut not in prefix.values:
            return self._decode(prefix.tokens, prefix.outputs)
        skip = skippable(prefix.nodes, cut)
        tap = Resume(self._ggml, prefix.nodes, skip, cut, prefix.values[cut])
        return self._decode(prefix.tokens, prefix.outputs, tap)

    def _decode(self, tokens: Tokens, outputs: tuple[int, ...], tap: Tap | None = None, *, copy: bool = True) -> Logits:
        if not 0 < len(tokens) <= self.n_batch:
            raise ValueError(f"a sequence of {len(tokens)} tokens; this engine takes 1 to {self.n_batch}")
        lib = self._llama
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        self._dispatcher.tap, self._dispatcher.error = tap, None
        try:
            _fill(batch, tokens, set(outputs))
            status = lib.llama_decode(self._context, batch)
            lib.llama_synchronize(self._context)
        finally:
            lib.llama_batch_free(batch)
            self._dispatcher.tap = None
            if tap is not None:
                tap.finish()
        if self._dispatcher.error is not None:
            raise self._dispatcher.error
        if status != 0:
            raise DynrunError(f"llama_decode failed with {status} on {self.path}")
        if not copy:
            return np.empty((0, self.n_vocab), dtype=np.float32)
        return self._outputs(outputs)

    def _outputs(self, outputs: tuple[int, ...]) -> Logits:
        # llama_get_logits holds the rows of the positions asked for, in the order of the batch.
        flat = np.ctypeslib.as_array(self._llama.llama_get_logits(self._context), (len(outputs) * self.n_vocab,))
        rows = flat.reshape(len(outputs), self.n_vocab)
        order = np.argsort(np.argsort(outputs)) if list(outputs) != sorted(outputs) else slice(None)
        return np.array(rows[order])

    # -- weights ---------------------------------------------------------------------------------------------------

    def _find_weights(self) -> dict[str, Weight]:
        """Decode one token and look at what every node reads."""
        tap = FindTensors(self.header.tensors)
        self._decode([self.bos if self.bos >= 0 else 0], (0,), tap)
        found = {}
        for name, pointer in tap.found.items():
            tensor = GgmlTensor.from_address(pointer)
            shape = list(tensor.ne)
            while len(shape) > 1 and shape[-1] == 1:
                shape.pop()
            found[name] = Weight(name, pointer, tensor.type, tuple(shape))
        return found

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a weight as it is now."""
        return self._ggml.tensor_bytes(self.weights[name].pointer)

    @contextmanager
    def replaced(self, name: str, data: npt.NDArray[Any]) -> Iterator[None]:
        """Have other bytes in weight ``name``; afterwards it is restored, whatever happens in between."""
        pointer = self.weights[name].pointer
        original = self._ggml.tensor_bytes(pointer)
        self._ggml.set_tensor_bytes(pointer, data)
        try:
            yield
        finally:
            self._ggml.set_tensor_bytes(pointer, original)


class _Log:
    """Keep the last lines that llama.cpp logs instead of printing them."""

    def __init__(self, lib: Any) -> None:
        self.lines: list[str] = []
        self._callback = lib.llama_log_callback(self._take)
        lib.llama_log_set(self._callback, ctypes.c_void_p(0))
        _LOGS.append(self)  # llama.cpp keeps the pointer for as long as the process lives
        del _LOGS[:-1]

    def _take(self, _level: int, text: bytes, _data: ctypes.c_void_p) -> None:
        self.lines.append(text.decode("utf-8", "replace").rstrip())
        del self.lines[:-200]

    def last_error(self) -> str:
        """The most telling line: what llama.cpp says after "error …:", else its last line."""
        for line in self.lines:
            if match := re.search(r"\berror[^:]*: (.+)", line):
                return match[1]
        return (self.lines or ["no reason given"])[-1]


_LOGS: list[_Log] = []


def _fill(batch: Any, tokens: Tokens, outputs: set[int]) -> None:
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, i in outputs
        batch.seq_id[i][0] = 0
