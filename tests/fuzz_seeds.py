"""Good files of each kind, small, for tests/fuzz_targets.py to begin with."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dynrun.calibration.imatrix import Imatrix, write_imatrix
from dynrun.scheme import Scheme, render
from tests.fuzz_targets import json_lines
from tests.tiny import write_tiny_llama
from tests.unit.test_header import write_model

_CHATS: tuple[dict[str, object], ...] = (
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, how are you?"}]},
    {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "system": "Be brief."},
    {"instruction": "Add", "input": "1 and 2", "output": "3", "history": [["a", "b"]]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "Ask the tool.",
                "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
            },
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "It is sunny."},
        ],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
    },
    {"text": "Plain text of a document, long enough to be something. " * 4},
)


def _tiny(folder: Path, name: str = "seed.gguf") -> bytes:
    path = write_tiny_llama(folder / name, n_vocab=264, n_embd=32, n_block=1, n_ff=32, n_head=2, n_head_kv=1)
    data = path.read_bytes()
    path.unlink()
    return data


def _ggufs(folder: Path) -> list[bytes]:
    path = write_model(folder / "seed.gguf")
    data = path.read_bytes()
    path.unlink()
    return [data, _tiny(folder)]


def _schemes(_: Path) -> list[bytes]:
    types = {"token_embd.weight": "Q8_0", "blk.0.ffn_up.weight": "Q4_K", "blk.1.ffn_up.weight": "IQ3_XXS"}
    slopes = {"blk.0.ffn_up.weight": ((0.1, 0.5), (0.01, 0.04))}
    full = Scheme(types, "Q4_K_M", "llama", "tiny", "0" * 64, 1000, 999, 0.5, "builtin", "1" * 64, slopes=slopes)
    by_hand = '[scheme]\nformat = 1\n[types]\ndefault = "Q4_K"\n"blk.*.ffn_down" = "Q6_K"\n"blk.0-3.attn_v" = "Q8_0"\n'
    return [render(full).encode(), by_hand.encode()]


def _imatrices(folder: Path) -> list[bytes]:
    sums = {"blk.0.ffn_up.weight": np.ones((1, 8)), "blk.0.ffn_up_exps.weight": np.ones((2, 8))}
    counts = {"blk.0.ffn_up.weight": np.full(1, 4.0), "blk.0.ffn_up_exps.weight": np.array([3.0, 0.0])}
    path = folder / "seed.gguf"
    write_imatrix(Imatrix(sums, counts, ("builtin",), 2, 512), path)
    data = path.read_bytes()
    path.unlink()
    return [data]


def _legacy(_: Path) -> list[bytes]:
    name = b"blk.0.ffn_up.weight"
    entry = struct.pack("<i", len(name)) + name + struct.pack("<ii4f", 2, 4, 1.0, 2.0, 3.0, 4.0)
    return [struct.pack("<i", 1) + entry + struct.pack("<ii", 2, 4) + b"wiki"]


def _parquet(folder: Path) -> list[bytes]:
    path = folder / "seed.parquet"
    pq.write_table(pa.table({"messages": [chat["messages"] for chat in (_CHATS[0],)], "text": ["x"]}), path)
    data = path.read_bytes()
    path.unlink()
    return [data]


SEEDS: dict[str, Callable[[Path], list[bytes]]] = {
    "header": _ggufs,
    "shards": _ggufs,
    "scheme-from-gguf": lambda folder: [_tiny(folder)],
    "scheme": _schemes,
    "imatrix": _imatrices,
    "imatrix-legacy": _legacy,
    "calibration-jsonl": lambda _: [json_lines(*_CHATS)],
    "calibration-json": lambda _: [json.dumps(_CHATS).encode()],
    "calibration-text": lambda _: [gzip.compress(b" = Title = \n\nSome text. " * 50, mtime=0)],
    "calibration-parquet": _parquet,
}
