"""Models as shapes without weights: from the public configurations of large models to headers and sparse GGUFs.

``NAME.toml`` lists metadata and tensors; ``blk.*`` stands for all layers, ``blk.3-60`` and ``blk.2,5`` for some.
``NAME.PRESET.json``: the types that llama-quantize gives the tensors without an imatrix, by runs of layers; a native
test compares them with its dry run, and ``python -m tests.shapes`` writes them anew.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from dynrun.gguf.header import Header, TensorInfo, padded
from dynrun.gguf.tensor_types import TENSOR_TYPES

Runs = dict[str, list[tuple[int, int, str]]]
FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


PRESETS = (
    *(("gemma-3-27b", preset) for preset in ("Q3_K_M", "Q4_K_M", "Q6_K", "Q8_0")),
    *(("llama-4-scout", preset) for preset in ("IQ2_XXS", "Q4_K_M")),
    *(("qwen3-235b-a22b", preset) for preset in ("Q2_K", "Q4_K_M")),
    *(("deepseek-v3", preset) for preset in ("IQ2_XXS", "Q4_K_M")),
    ("gpt-oss-120b", "MXFP4_MOE"),
)


def dry_run(name: str, preset: str, folder: Path) -> Runs:
    """What llama-quantize would make of that model, by kind of tensor: runs of layers (first, last, type)."""
    from dynrun.llamacpp.tools import quantize_dry_run

    path = write_sparse(folder / f"{name}-F16.gguf", name, "F16")
    types = quantize_dry_run(path, preset, imatrix=None).types
    path.unlink()
    runs: Runs = {}
    for tensor, _ in _tensors(_read(name)):
        if tensor not in types:
            continue
        match = re.match(r"blk\.(\d+)\.(.+)", tensor)
        kind, layer = (match[2], int(match[1])) if match else (tensor, 0)
        found = runs.setdefault(kind, [])
        if found and found[-1][1] == layer - 1 and found[-1][2] == types[tensor]:
            found[-1] = (found[-1][0], layer, types[tensor])
        else:
            found.append((layer, layer, types[tensor]))
    return runs


def shape_header(name: str, types: Mapping[str, str] | str) -> Header:
    """The header of a file of that model; ``types``: one for all weights of two dimensions or more, or by tensor."""
    data, offset = _read(name), 0
    tensors = {}
    for tensor, shape in _tensors(data):
        kind = TENSOR_TYPES[_type_of(tensor, shape, types)]
        n = 1
        for size in shape:
            n *= size
        tensors[tensor] = TensorInfo(tensor, kind.name, tuple(shape), offset, kind.nbytes(n))
        offset += padded(kind.nbytes(n), 32)
    metadata = {"general.architecture": data["architecture"], f"{data['architecture']}.block_count": data["layers"]}
    metadata |= {f"{data['architecture']}.{key}": value for key, value in data["metadata"].items()}
    # A vocabulary takes about 45 bytes a token with its merges.
    before = padded(45 * data["metadata"]["vocab_size"], 32)
    return Header(Path(f"{name}.gguf"), metadata, {}, tensors, before, before + offset, 32)


def preset_types(name: str, preset: str) -> dict[str, str]:
    """The type of every tensor in that stock preset of that model."""
    runs = json.loads((FOLDER / f"{name}.{preset}.json").read_text(encoding="utf-8"))
    types = {}
    for tensor, shape in _tensors(_read(name)):
        match = re.match(r"blk\.(\d+)\.(.+)", tensor)
        kind, layer = (match[2], int(match[1])) if match else (tensor, 0)
        found = [name for first, last, name in runs.get(kind, []) if first <= layer <= last]
        types[tensor] = found[0] if found else _type_of(tensor, shape, "F32")
    return types


def write_sparse(path: Path, name: str, types: Mapping[str, str] | str) -> Path:
    """A GGUF that has all that llama.cpp reads before the weights, and a hole in their place; no vocabulary."""
    header = shape_header(name, types)
    writer = gguf.GGUFWriter(path, header.architecture)
    for key, value in header.metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    writer.add_tokenizer_model("none")
    for tensor in header.tensors.values():
        # The writer takes shapes as numpy has them, of quantized types in bytes.
        kind = TENSOR_TYPES[tensor.type]
        row = tensor.shape[0] // kind.block_size * kind.type_size if kind.block_size > 1 else tensor.shape[0]
        shape = [*reversed(tensor.shape[1:]), row]
        raw = gguf.GGMLQuantizationType(kind.ggml_id)
        dtype = {"F32": "float32", "F16": "float16"}.get(kind.name, "uint8")
        writer.add_tensor_info(tensor.name, shape, np.dtype(dtype), tensor.nbytes, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as stream:
        stream.seek(0, 2)
        stream.truncate(padded(stream.tell(), 32) + header.file_bytes - header.data_offset)
    return path


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def _tensors(data: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    for pattern, shape in data["tensors"].items():
        match = re.match(r"blk\.(\*|(\d+)-(\d+)|\d+(?:,\d+)+)\.", pattern)
        if match is None:
            yield pattern, shape
            continue
        if match[1] == "*":
            layers: Iterable[int] = range(data["layers"])
        else:
            layers = range(int(match[2]), int(match[3]) + 1) if match[2] else map(int, match[1].split(","))
        for layer in layers:
            yield f"blk.{layer}.{pattern[match.end() :]}", shape


def _type_of(tensor: str, shape: list[int], types: Mapping[str, str] | str) -> str:
    if isinstance(types, str):
        small = len(shape) < 2 or any(part in tensor for part in ("ffn_gate_inp", "conv", "ssm_a", "bias"))
        return "F32" if small else types
    return types[tensor]


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
