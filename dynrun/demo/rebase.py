"""The demo model: a small llama re-expressed in another basis of its residual stream.

usage: python -m dynrun.demo.rebase IN.gguf OUT.gguf [--blocks 2:2]     (for benchmarks: 2:2 turns, 3:4 widens)

The packaged SmolLM2-135M is stored as Q4_1 with a hidden size of 576: its weights already lie on a 4-bit grid and its
rows are no multiple of 256. With x' = xR, R block-diagonal with random 3→4 isometries (R·Rᵀ = 1), the model is the same
function on 768 columns and its weights lie on no grid:

    W_in' = W_in·diag(g)·R·√(n/N)    W_out' = Rᵀ·W_out    E' = E·R    head' = head·diag(g)·R·√(n/N)
    norm gains 1, epsilon' = epsilon·n/N

as mean(x'²) = mean(x²)·n/N. Each FFN may be written as equal experts behind a random router: with the chosen experts'
weights summing to one (llama.cpp normalizes them for this architecture) it is the same function again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

from dynrun.artifacts import atomic_path
from dynrun.errors import UsageError

Array = npt.NDArray[np.float64]
Dtype = Literal["F16", "F32"]

SEED = 20261123
_ARCHITECTURES = ("llama", "qwen2")
_FTYPE = {"F32": 0, "F16": 1}
_INPUT_KINDS = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
_REWRITTEN = ("general.architecture", "general.file_type", "general.quantization_version")


@dataclass(frozen=True)
class Basis:
    """A block-diagonal isometry from ``n`` to ``wide`` columns; ``blocks`` has shape [n/3, 3, 4], or with others."""

    blocks: Array

    @property
    def n(self) -> int:
        return int(self.blocks.shape[0] * self.blocks.shape[1])

    @property
    def wide(self) -> int:
        return int(self.blocks.shape[0] * self.blocks.shape[2])

    def right(self, matrix: Array) -> Array:
        """``matrix`` [rows, n] times R: [rows, wide]."""
        parts = matrix.reshape(len(matrix), -1, self.blocks.shape[1]).transpose(1, 0, 2)
        wide: Array = np.matmul(parts, self.blocks).transpose(1, 0, 2)
        return wide.reshape(len(matrix), self.wide)


def random_basis(n: int, seed: int = SEED, blocks: tuple[int, int] = (3, 4)) -> Basis:
    """Random isometries, 3→4 by default: the Q of a QR decomposition of a Gaussian matrix, transposed."""
    narrow, wide = blocks
    if n % narrow or narrow > wide:
        raise UsageError(f"a hidden size of {n} takes no {narrow}:{wide} blocks", fix="choose blocks that divide it")
    gaussian = np.random.default_rng(seed).standard_normal((n // narrow, wide, narrow))
    q, r = np.linalg.qr(gaussian)
    # The sign convention of QR is the library's own; fixing it makes the basis the same everywhere.
    q = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :]
    return Basis(np.ascontiguousarray(q.transpose(0, 2, 1)))


def rebase(
    source: Path,
    out: Path,
    *,
    dtype: Dtype = "F16",
    n_expert: int = 0,
    seed: int = SEED,
    blocks: tuple[int, int] = (3, 4),
) -> None:
    """Write the llama or qwen2 of ``source`` in another basis; with ``n_expert`` its FFNs as experts, top 2."""
    model = _Source(source)
    if model.architecture not in _ARCHITECTURES:
        raise UsageError(f"{source} is a {model.architecture} model", fix=f"rebase one of {', '.join(_ARCHITECTURES)}")
    basis = random_basis(model.n_embd, seed, blocks)
    with atomic_path(out) as temporary:
        writer = GGUFWriter(str(temporary), model.architecture)
        model.copy_metadata(writer)
        _write_shape(writer, model, basis)
        if n_expert:
            writer.add_expert_count(n_expert)
            writer.add_expert_used_count(2)
        _write(writer, _rebased(model, basis, n_expert, seed), dtype)


def dequantized(source: Path, out: Path) -> None:
    """Write ``source`` unchanged but as F32: the oracle that the rebased model is tested against."""
    model = _Source(source)
    with atomic_path(out) as temporary:
        writer = GGUFWriter(str(temporary), model.architecture)
        model.copy_metadata(writer)
        _write(writer, ((name, partial(model.weight, name)) for name in model.tensors), "F32")


class _Source:
    """The tensors and metadata of a small GGUF."""

    def __init__(self, path: Path) -> None:
        self.reader = GGUFReader(str(path))
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.architecture = str(self.value("general.architecture"))
        self.n_embd: int = int(self.shape_value("embedding_length"))
        self.n_block = int(self.shape_value("block_count"))

    def value(self, key: str) -> Any:
        field = self.reader.fields[key]
        return field.contents()

    def shape_value(self, key: str) -> Any:
        return self.value(f"{self.architecture}.{key}")

    def weight(self, name: str) -> Array:
        tensor = self.tensors[name]
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float64)

    def copy_metadata(self, writer: GGUFWriter) -> None:
        for key, field in self.reader.fields.items():
            if key.startswith("GGUF.") or key in _REWRITTEN:
                continue
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type)


def _write_shape(writer: GGUFWriter, model: _Source, basis: Basis) -> None:
    heads = int(model.shape_value("attention.head_count"))
    prefix, name = model.architecture, model.reader.fields.get("general.basename", model.reader.fields["general.name"])
    replaced = {
        f"{prefix}.embedding_length": (basis.wide, GGUFValueType.UINT32),
        f"{prefix}.attention.layer_norm_rms_epsilon": (
            float(model.shape_value("attention.layer_norm_rms_epsilon")) * basis.n / basis.wide,
            GGUFValueType.FLOAT32,
        ),
        f"{prefix}.attention.key_length": (basis.n // heads, GGUFValueType.UINT32),
        f"{prefix}.attention.value_length": (basis.n // heads, GGUFValueType.UINT32),
        f"{prefix}.rope.dimension_count": (basis.n // heads, GGUFValueType.UINT32),
        "general.name": (f"{name.contents()} rebased to {basis.wide}", GGUFValueType.STRING),
    }
    for key, (value, kind) in replaced.items():
        # The writer refuses a second value for a key: replace what was copied.
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, kind)


def _rebased(model: _Source, basis: Basis, n_expert: int, seed: int) -> Iterator[tuple[str, Callable[[], Array]]]:
    scale = float(np.sqrt(basis.n / basis.wide))

    def inward(name: str, gain: str) -> Callable[[], Array]:
        return lambda: basis.right(model.weight(name) * model.weight(gain)) * scale

    def outward(name: str) -> Callable[[], Array]:
        return lambda: np.ascontiguousarray(basis.right(model.weight(name).T).T)

    yield "token_embd.weight", lambda: basis.right(model.weight("token_embd.weight"))
    for index in range(model.n_block):
        block = f"blk.{index}."
        for norm in ("attn_norm", "ffn_norm"):
            yield f"{block}{norm}.weight", lambda: np.ones(basis.wide)
        for kind in _INPUT_KINDS[:3]:
            yield f"{block}{kind}.weight", inward(f"{block}{kind}.weight", f"{block}attn_norm.weight")
            # Added to the heads' own columns, which are not turned.
            if f"{block}{kind}.bias" in model.tensors:
                yield f"{block}{kind}.bias", partial(model.weight, f"{block}{kind}.bias")
        yield f"{block}attn_output.weight", outward(f"{block}attn_output.weight")
        ffn = {kind: inward(f"{block}{kind}.weight", f"{block}ffn_norm.weight") for kind in _INPUT_KINDS[3:]}
        ffn["ffn_down"] = outward(f"{block}ffn_down.weight")
        if n_expert:
            yield f"{block}ffn_gate_inp.weight", _router(basis.wide, n_expert, seed + 1 + index)
        for kind, make in ffn.items():
            yield (
                (f"{block}{kind}_exps.weight", _experts(make, n_expert))
                if n_expert
                else (f"{block}{kind}.weight", make)
            )
    yield "output_norm.weight", lambda: np.ones(basis.wide)
    head = "output.weight" if "output.weight" in model.tensors else "token_embd.weight"
    yield "output.weight", inward(head, "output_norm.weight")


def _router(wide: int, n_expert: int, seed: int) -> Callable[[], Array]:
    return lambda: np.random.default_rng(seed).standard_normal((n_expert, wide)) / np.sqrt(wide)


def _experts(make: Callable[[], Array], n_expert: int) -> Callable[[], Array]:
    def broadcast() -> Array:
        one = make()
        return np.broadcast_to(one, (n_expert, *one.shape))

    return broadcast


def _write(writer: GGUFWriter, tensors: Iterator[tuple[str, Callable[[], Array]]], dtype: Dtype) -> None:
    """Write header, then data. Equal experts stay one array in memory until they are written."""
    writer.add_file_type(_FTYPE[dtype])
    made: list[tuple[npt.NDArray[Any], type[np.float16 | np.float32]]] = []
    for name, make in tensors:
        value = make()
        # Norms and routers stay F32, as in every llama.cpp conversion.
        kind = np.float32 if value.ndim < 2 or "ffn_gate_inp" in name or dtype == "F32" else np.float16
        made.append((value[:1].astype(kind) if value.strides[0] == 0 else value.astype(kind), kind))
        writer.add_tensor_info(name, value.shape, np.dtype(kind), value.size * np.dtype(kind).itemsize)
        if value.strides[0] == 0:
            made[-1] = (np.broadcast_to(made[-1][0], value.shape), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for value, kind in made:
        writer.write_tensor_data(np.ascontiguousarray(value, dtype=kind))
    writer.close()


def main() -> None:
    """Rebase a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", default="3:4")
    options = parser.parse_args()
    narrow, _, wide = options.blocks.partition(":")
    rebase(options.source, options.out, blocks=(int(narrow), int(wide)))


if __name__ == "__main__":
    main()
