"""Good files of each kind, small, for tests/fuzz_targets.py to begin with."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dynrun.calibration.imatrix import Imatrix, write_imatrix
from dynrun.scheme import Scheme, render
from dynrun.scoring.reference import encode_logits
from tests.fuzz_cache import logits
from tests.fuzz_convert import folders
from tests.fuzz_targets import json_lines
from tests.fuzz_wire import CONTENT
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


def _codes(folder: Path) -> list[bytes]:
    path = folder / "seed.npy"
    np.save(path, encode_logits(logits()))
    data = path.read_bytes()
    path.unlink()
    return [data]


def _manifests(_: Path) -> list[bytes]:
    inputs = {"reference": "0" * 64, "parts": "1", "format": 2, "llama_cpp": "1" * 40, "backend": "cuda"}
    return [json.dumps({"files": {"00000.npy": 5}, "inputs": inputs, "result": {"n_vocab": 24}}).encode()]


# -- answers of servers ------------------------------------------------------------------------------------------------

_TIMINGS = {"prompt_n": 5, "prompt_ms": 9.5, "prompt_per_second": 526.0, "predicted_n": 2, "predicted_ms": None}
_DELTAS: tuple[dict[str, object], ...] = (
    {"prompt_progress": {"total": 5, "cache": 0, "processed": 5, "time_ms": 9}, "choices": []},
    {"choices": [{"index": 0, "finish_reason": None, "delta": {"role": "assistant", "content": None}}]},
    {"choices": [{"index": 0, "finish_reason": None, "delta": {"reasoning_content": "A greeting."}}]},
    {"choices": [{"index": 0, "finish_reason": None, "delta": {"content": "Hëllo"}}], "timings": _TIMINGS},
    {"choices": [{"index": 0, "finish_reason": "stop", "delta": {}}], "timings": _TIMINGS},
)
_ERROR = {"error": {"code": 400, "message": "too long", "type": "exceed_context_size_error", "n_ctx": 512}}


def _http(status: str, body: bytes = b"", **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\n{lines}Connection: close\r\n\r\n".encode() + body


def _streams(_: Path) -> list[bytes]:
    events = b"".join(f"data: {json.dumps(delta)}\n\n".encode() for delta in _DELTAS)
    plain = b'data: {"choices": [{"text": "x", "finish_reason": "length"}]}\n\ndata: [DONE]\n\n'
    refused = _http("400 Bad Request", json.dumps(_ERROR).encode())
    return [b": ping\n\n" + events + b"data: [DONE]\n\n", plain, refused, f"error: {json.dumps(_ERROR)}\n".encode()]


def _generated(_: Path) -> list[bytes]:
    usage = {"prompt_tokens": 12, "completion_tokens": 3}
    message = {"role": "assistant", "content": "I am well.", "reasoning_content": "They ask."}
    good = json.dumps({"choices": [{"message": message}], "usage": usage}).encode()
    failed = _http("500 Internal Server Error", b'{"error": {"message": "no parser", "type": "server_error"}}')
    return [good, failed + b"\n%%\n" + good, _http("400 Bad Request", json.dumps(_ERROR).encode())]


def _served(_: Path) -> list[bytes]:
    models = {"m": {"path": "/model.gguf", "n_ctx": 512}}
    return [json.dumps({"started_s": 0.0, "url": "http://127.0.0.1:1", "key_file": "/k", "models": models}).encode()]


_LOGS = (
    (
        b"0.00.001.000 I srv llama_server: loading model\n"
        b"0.00.005.166 E ggml_backend_cuda_buffer_type_alloc_buffer: allocating 8 MiB on device 0: out of memory\n"
        b"0.00.005.200 E llama_model_load: error loading model: unable to allocate CUDA0 buffer\n"
        b"0.00.005.201 E srv load_model: failed to load model, '/model.gguf'\n"
    ),
    b"0.00.001.000 E gguf_init_from_file: invalid magic characters: 'xxxx'\nfailed to load model\n",
    b"/src/ggml.c:1576: GGML_ASSERT(ctx->mem_buffer != NULL) failed\n",
    b"0.00.001.000 E srv start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 1\n",
)


def _repositories(_: Path) -> list[bytes]:
    commit, digest = "a" * 40, "b" * 64
    info = {"id": "owner/name", "sha": commit, "siblings": [{"rfilename": "model-Q4_K_M.gguf"}], "tags": ["gguf"]}
    large = {"oid": digest, "size": 64, "pointerSize": 135}
    tree = [
        {"type": "directory", "path": "BF16", "oid": commit, "size": 0},
        {"type": "file", "path": "README.md", "size": 9, "oid": commit},
        {"type": "file", "path": "model-Q4_K_M.gguf", "size": 64, "oid": commit, "lfs": large, "xetHash": digest},
        {"type": "file", "path": "BF16/m-BF16-00001-of-00002.gguf", "size": 64, "oid": commit, "lfs": large},
    ]
    bodies = [json.dumps(info).encode(), json.dumps(tree).encode()]
    paged = _http("200 OK", bodies[1], Link='<{URL}/api/models/x/tree?cursor=1>; rel="next"')
    gone = _http("404 Not Found", X_Error_Code="RepoNotFound")
    gated = _http("403 Forbidden", X_Error_Code="GatedRepo")
    return [b"\n%%\n".join(one) for one in (bodies, [bodies[0], paged, b"[]"], [gone, bodies[0], *bodies], [gated])]


def _hits(_: Path) -> list[bytes]:
    hit = {
        "id": "owner/name-GGUF",
        "downloads": 9,
        "likes": 1,
        "gated": "auto",
        "lastModified": "2026-01-01T00:00:00.000Z",
    }
    return [json.dumps([hit, {"id": "b/c", "gated": False}]).encode()]


def _ranges(_: Path) -> list[bytes]:
    digest, whole = sha256(CONTENT).hexdigest(), f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"
    found = _http("200 OK", X_Repo_Commit="0" * 40, X_Linked_Etag=f'"{digest}"', X_Linked_Size="64", ETag='"e"')
    part = _http("206 Partial Content", CONTENT, Content_Range=whole)
    away = _http("302 Found", Location="{URL}/storage?Signature=1", X_Linked_Etag=f'"{digest}"', X_Linked_Size="64")
    late = _http("503 Service Unavailable", Retry_After="1")
    return [
        b"\n%%\n".join(one) for one in ([part], [away, part], [found, part], [found, away, part], [late, found, part])
    ]


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
    "remote-header": _ggufs,
    "convert-folder": folders,
    "kld-cache": _codes,
    "kld-manifest": _manifests,
    "reply": _streams,
    "generated": _generated,
    "health": lambda _: [b'{"status": "ok"}', _http("503 Service Unavailable", b"{}")],
    "served": _served,
    "server-log": lambda _: list(_LOGS),
    "hub-repository": _repositories,
    "hub-search": _hits,
    "hub-range": _ranges,
    "hub-pull": _ranges,
    "hub-waits": lambda _: [b"7", b"Wed, 21 Oct 2026 07:28:00 GMT", b'\n"api";r=0;t=12'],
}
