"""A stranger's folder of a model, as tests/fuzz_targets.py has it: looked at and planned, nothing of it converted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dynrun.convert.folder import read_folder
from dynrun.convert.plan import following_bytes, plan_conversion
from tests.safetensors_files import LLAMA_CONFIG, llama_shapes, write_safetensors

_BETWEEN = b"\n%%\n"
_SHARD = "model-00001-of-00001.safetensors"
# The files of a folder in the order in which the bytes hold them; an empty one is not there.
_NAMES = ("config.json", _SHARD, "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")


def _folder(path: Path) -> object:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parts = zip(_NAMES, path.read_bytes().split(_BETWEEN, len(_NAMES) - 1), strict=False)
        files = {name: data for name, data in parts if data}
        for name, data in files.items():
            (folder / name).write_bytes(data)
        source = read_folder(folder)
        plans = [plan_conversion(source, part) for part in ("model", "mmproj")]
        assert all(plan.result_bytes >= 0 and plan.memory_bytes >= 0 for plan in plans)
        assert {file.name for file in folder.iterdir()} == set(files)
        return source.architecture, source.weight_bytes, source.code, following_bytes(source, 2)


def folders(folder: Path) -> list[bytes]:
    """Of a llama: plain, with an index and a tokenizer, in FP8, and of a configuration that names code."""
    small = LLAMA_CONFIG | {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32, "num_hidden_layers": 1}
    weights = {dtype: _weights(folder / _SHARD, small, dtype) for dtype in ("F16", "BF16", "F8_E4M3")}
    index = {"metadata": {}, "weight_map": dict.fromkeys(llama_shapes(small), _SHARD)}
    vocabulary = {f"t{i}": i for i in range(small["vocab_size"])}
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary, "merges": ["t 1", ["t", "2"]]}}
    named = small | {"auto_map": {"AutoConfig": "evil.Config"}}
    found = (
        [json.dumps(small).encode(), weights["F16"]],
        [json.dumps(small).encode(), weights["BF16"], json.dumps(index).encode(), json.dumps(tokenizer).encode()],
        [json.dumps(small | {"quantization_config": {"quant_method": "fp8"}}).encode(), weights["F8_E4M3"]],
        [json.dumps(named).encode(), weights["F16"], b"", b"", b'{"tokenizer_class": "T"}'],
    )
    return [_BETWEEN.join(parts) for parts in found]


def _weights(path: Path, config: Mapping[str, Any], dtype: str) -> bytes:
    data = write_safetensors(path, llama_shapes(config), dtype).read_bytes()
    path.unlink()
    return data


TARGETS = {"convert-folder": (_folder, "folder.bin")}
