"""Nanoseconds per weight of each tensor type on this machine: what `make --min-speed` chooses by.

For every type two models of that type alone are written, of one shape and different depth; the time per token of the
deeper one less that of the shallower one, over the weights that it has more, is free of what every token costs anyway.
The weights are random: speed does not depend on them. Gives the TOML that allocation/speed.py reads; decides nothing.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dynrun.artifacts import translated_os_errors, write_text
from dynrun.errors import DoesNotFitError, DynrunError
from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.llamacpp import tools
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.library import ggml
from dynrun.paths import cache_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gguf import GGUFWriter

_N_GEN, _REPETITIONS, _MOST_TRIES = 16, 3, 3
# Quantizing is slow for some types, and repeated rows are as fast to multiply as different ones.
_DRAWN_ROWS = 32


@dataclass(frozen=True)
class Shape:
    """A llama-like layer, and the depths of the two models: together large enough that no cache holds the deeper one.

    The default has 48 million weights a layer, as a model of 1 to 3 billion has.
    """

    n_embd: int = 2048
    n_ff: int = 6144
    n_head: int = 16
    n_head_kv: int = 4
    shallow: int = 2
    deep: int = 10

    @property
    def layer(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of a layer's matrices."""
        n_kv = self.n_embd // self.n_head * self.n_head_kv
        return {
            "attn_q": (self.n_embd, self.n_embd),
            "attn_k": (n_kv, self.n_embd),
            "attn_v": (n_kv, self.n_embd),
            "attn_output": (self.n_embd, self.n_embd),
            "ffn_gate": (self.n_ff, self.n_embd),
            "ffn_up": (self.n_ff, self.n_embd),
            "ffn_down": (self.n_embd, self.n_ff),
        }

    @property
    def weights_between(self) -> int:
        """How many weights the deeper model has more."""
        return (self.deep - self.shallow) * sum(rows * columns for rows, columns in self.layer.values())


Progress = Callable[[int, int, str], None]


def measure_types(
    types: Sequence[str],
    *,
    n_threads: int,
    rounds: int = 3,
    shape: Shape = Shape(),
    options: Sequence[str] = (),
    on_progress: Progress = lambda *_: None,
) -> dict[str, float]:
    """Nanoseconds per weight of each of ``types``, from the best of ``rounds``; ``options`` are llama-bench's.

    Raises DoesNotFitError for a full disk, DynrunError where a machine is too busy to tell two depths apart.
    """
    found: dict[str, float] = {}
    for done, name in enumerate(types):
        on_progress(done, len(types), name)
        with _folder() as folder:
            shallow = write_model(folder / "shallow.gguf", name, shape, shape.shallow)
            deep = write_model(folder / "deep.gguf", name, shape, shape.deep)
            found[name] = _difference(shallow, deep, n_threads, options, rounds) / shape.weights_between
    on_progress(len(types), len(types), "")
    return found


def _difference(shallow: Path, deep: Path, n_threads: int, options: Sequence[str], rounds: int) -> float:
    """Nanoseconds by which a token of ``deep`` takes longer, of the least disturbed run of each."""
    times: dict[Path, list[float]] = {shallow: [], deep: []}
    for _ in range(_MOST_TRIES):
        for model, _round in product(times, range(rounds)):
            times[model].append(_token_ns(model, n_threads, options))
        if (difference := min(times[deep]) - min(times[shallow])) > 0:
            return difference
    raise DynrunError("the speeds of two models drown in noise", fix="end other programs and try again")


def write_table(path: Path, ns_per_weight: Mapping[str, float], machine: str, threads: int) -> None:
    """The table as a file, with where it is from."""
    when = time.strftime("%Y-%m-%d")
    built = installation()
    lines = [
        f"# Measured by `dynrun bench --types` on {when}: {machine}, {threads} threads,",
        f"# llama.cpp {built.commit} for {built.backend}. For `dynrun make --speed-table`.",
        "",
        "[ns_per_weight]",
        *(f"{name} = {value:.5f}" for name, value in ns_per_weight.items()),
    ]
    write_text(path, "\n".join(lines) + "\n")


def _token_ns(model: Path, n_threads: int, options: Sequence[str]) -> float:
    sizes: dict[str, Any] = {"n_prompt": 0, "n_gen": _N_GEN, "repetitions": _REPETITIONS}
    (row,) = tools.bench(model, **sizes, n_threads=n_threads, options=options)
    return 1e9 / max(row.samples)


@contextmanager
def _folder() -> Iterator[Path]:
    parent = cache_dir() / "type-speed"
    with translated_os_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_model(path: Path, type_name: str, shape: Shape, n_block: int) -> Path:
    """A model of ``n_block`` layers whose matrices are all of one type, without a vocabulary."""
    # Heavy, and needed here only.
    from gguf import GGUFWriter

    columns = {n for _, n in shape.layer.values()}
    if not all(TENSOR_TYPES[type_name].fits(n) for n in columns):
        raise DynrunError(f"{type_name} does not fit rows of {sorted(columns)}")
    need = n_block * sum(TENSOR_TYPES[type_name].nbytes(r * c) for r, c in shape.layer.values())
    if shutil.disk_usage(path.parent).free < 1.2 * need:
        raise DoesNotFitError(f"{path.parent} has no room for {need:,} bytes", fix="free some space")
    writer = GGUFWriter(str(path), "llama")
    _describe(writer, shape, n_block)
    drawn = {n: _drawn(type_name, n) for n in columns}
    for block in range(n_block):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{norm}.weight", np.ones(shape.n_embd, np.float32))
        for name, (rows, n) in shape.layer.items():
            data = np.resize(drawn[n], (rows, drawn[n].shape[1]))
            writer.add_tensor(f"blk.{block}.{name}.weight", data, raw_dtype=_raw(type_name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _describe(writer: GGUFWriter, shape: Shape, n_block: int) -> None:
    n_vocab = 256
    writer.add_block_count(n_block)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(n_vocab)
    writer.add_tokenizer_model("no_vocab")
    writer.add_tensor("token_embd.weight", np.zeros((n_vocab, shape.n_embd), np.float16))
    writer.add_tensor("output_norm.weight", np.ones(shape.n_embd, np.float32))


def _drawn(type_name: str, n_columns: int) -> npt.NDArray[np.uint8]:
    """A few rows of random weights in the type, as bytes [rows, bytes of a row]."""
    kind = TENSOR_TYPES[type_name]
    rows = np.random.default_rng(0).normal(0, 0.02, (_DRAWN_ROWS, n_columns)).astype(np.float32)
    data = ggml().quantize(kind.ggml_id, rows, np.ones(n_columns, np.float32))
    return data.reshape(_DRAWN_ROWS, kind.nbytes(n_columns))


def _raw(type_name: str) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(TENSOR_TYPES[type_name].ggml_id)
