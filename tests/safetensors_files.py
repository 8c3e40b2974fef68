"""Write safetensors files and folders of them, sound and hostile ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def write_safetensors(path: Path, tensors: Mapping[str, tuple[int, ...]], dtype: str = "F16") -> Path:
    """Zeros of these shapes, in order."""
    size = {"F16": 2, "BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}[dtype]
    header, at = {}, 0
    for name, shape in tensors.items():
        end = at + size * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))
    return path


def save_tensors(path: Path, tensors: Mapping[str, tuple[str, np.ndarray]]) -> Path:
    """Types as the format names them, and arrays of their bits: uint16 for BF16, uint8 for F8_E4M3."""
    header, at = {}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for _, array in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def load_tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """The reverse, of types with a whole number of bytes."""
    kinds = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F8_E4M3": "u1", "U8": "u1", "I32": "<i4", "I64": "<i8"}
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        array = np.frombuffer(data[begin:end], dtype=kinds[entry["dtype"]]).reshape(entry["shape"])
        found[name] = (entry["dtype"], array)
    return found


def llama_shapes(config: Mapping[str, Any] = LLAMA_CONFIG) -> dict[str, tuple[int, ...]]:
    """The tensors of a llama of this configuration."""
    d, ff, n_vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (n_vocab, d), "model.norm.weight": (d,)}
    for i in range(config["num_hidden_layers"]):
        block: dict[str, tuple[int, ...]] = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        block |= {"self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
        block |= {
            "self_attn.o_proj": (d, d),
            "mlp.gate_proj": (ff, d),
            "mlp.up_proj": (ff, d),
            "mlp.down_proj": (d, ff),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def write_llama_folder(folder: Path, n_shards: int = 1, dtype: str = "F16", **changes: Any) -> Path:
    """A folder of a tiny llama without a tokenizer, with an index where there are shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG | changes))
    shapes = list(llama_shapes().items())
    if n_shards == 1:
        write_safetensors(folder / "model.safetensors", dict(shapes), dtype)
        return folder
    names, weight_map = [f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors" for i in range(n_shards)], {}
    for i, name in enumerate(names):
        part = dict(shapes[i::n_shards])
        write_safetensors(folder / name, part, dtype)
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    """``model.safetensors.index.json``."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict(weight_map)}))
