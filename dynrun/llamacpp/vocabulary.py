"""A model's vocabulary: text to tokens and back, without its weights.

Takes a GGUF, gives token ids. Loads in moments whatever the model's size; :class:`~dynrun.llamacpp.engine.Engine` is
one with weights.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any, Self

from dynrun.errors import DynrunError, NotFoundError
from dynrun.gguf.header import read_header
from dynrun.llamacpp.devices import model_devices
from dynrun.llamacpp.library import llama


class Vocabulary:
    """Open with :meth:`load`, use as a context manager."""

    def __init__(self, path: Path, model: Any, keep_alive: tuple[Any, ...]) -> None:
        self.path = path
        self.header = read_header(path)
        self._llama = llama()
        self._loaded, self._keep_alive = model, keep_alive
        self.n_vocab: int = self._llama.llama_vocab_n_tokens(self._vocab)

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """The vocabulary of a GGUF. Raises NotFoundError for a missing file, DynrunError where llama.cpp refuses it."""
        model, log = load_model(path, vocab_only=True)
        return Vocabulary(path, model, (log,))

    def close(self) -> None:
        """Free the model."""
        if self._loaded is not None:
            self._llama.llama_model_free(self._loaded)
            self._loaded = None

    @property
    def _model(self) -> Any:
        """llama.cpp's pointer, which must not be used once it is freed."""
        if self._loaded is None:
            raise ValueError(f"{self.path} is closed")
        return self._loaded

    @property
    def _vocab(self) -> Any:
        return self._llama.llama_model_get_vocab(self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tokenize(self, text: str, *, parse_special: bool = True, add_special: bool = False) -> list[int]:
        """Token ids of ``text``; special tokens in it are parsed unless told otherwise."""
        data = text.encode("utf-8", "replace")
        size = len(data) + 16
        buffer = (self._llama.llama_token * size)()
        n = self._llama.llama_tokenize(self._vocab, data, len(data), buffer, size, add_special, parse_special)
        if n < 0:
            raise DynrunError(f"{self.path} cannot tokenize a text of {len(data)} bytes")
        return list(buffer[:n])

    def piece(self, token: int) -> bytes:
        """The bytes of one token, special tokens as text. Raises ValueError where there is no such token."""
        if not 0 <= token < self.n_vocab:
            raise ValueError(f"no token {token} among {self.n_vocab}")
        buffer = ctypes.create_string_buffer(512)
        n = self._llama.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(n, 0)]

    def token_text(self, key: str) -> str:
        """The text of the token that a metadata key names; empty where there is none."""
        token = self.header.metadata.get(key)
        if not isinstance(token, int) or not 0 <= token < self.n_vocab:
            return ""
        return self.piece(token).decode("utf-8", "replace")

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
        vocab = self._vocab
        return frozenset(t for t in range(self.n_vocab) if self._llama.llama_vocab_is_eog(vocab, t))

    @property
    def normal_tokens(self) -> list[int]:
        """Tokens that are text: no special, unused or byte ones."""
        lib, vocab = self._llama, self._vocab
        return [
            token
            for token in range(self.n_vocab)
            if lib.llama_vocab_get_attr(vocab, token) & lib.LLAMA_TOKEN_ATTR_NORMAL
        ]


def load_model(
    path: Path,
    *,
    n_gpu_layers: int = -1,
    vocab_only: bool = False,
    load_mtp: bool = False,
    device: str = "",
    mapped: bool = False,
) -> tuple[Any, LlamaLog]:
    """llama.cpp's model, with ``load_mtp`` its MTP blocks too, and what it logs.

    On ``device`` (devices.py) alone where one is given. ``mapped`` weights must not be written. Raises NotFoundError,
    DynrunError, and what :func:`~dynrun.llamacpp.devices.resolve` raises.
    """
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist", fix="check the path")
    read_header(path)
    lib = llama()
    log = LlamaLog(lib)
    params = lib.llama_model_default_params()
    params.n_gpu_layers, params.vocab_only, params.load_mtp = n_gpu_layers, vocab_only, load_mtp
    # To be replaced in place weights must lie in memory of their own, in their own layout; the latter everywhere, as
    # other layouts have kernels that round otherwise.
    params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if mapped else lib.LLAMA_LOAD_MODE_NONE
    params.use_extra_bufts = False
    # Read during the load only; held until then.
    chosen = model_devices(device) if device else None
    params.devices = chosen and ctypes.addressof(chosen)
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise DynrunError(
            f"llama.cpp cannot load {path}: {log.last_error()}", fix="see `dynrun lint` or fetch it again"
        )
    return model, log


class LlamaLog:
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


_LOGS: list[LlamaLog] = []
