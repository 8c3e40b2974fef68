"""A tiny random image encoder (LLaVA's: a ViT and an MLP) for the model of tests/tiny.py, and an image."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, LlamaFileType

_N, _FF, _BLOCKS, _PATCH, _IMAGE = 32, 64, 2, 14, 28


def write_tiny_mmproj(path: Path, *, n_embd: int = 256) -> Path:
    """An encoder of 28×28 pixels in four patches, for a model of ``n_embd`` columns."""
    writer = GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)
    sizes = {"image_size": _IMAGE, "patch_size": _PATCH, "embedding_length": _N, "feed_forward_length": _FF}
    sizes |= {"projection_dim": n_embd, "block_count": _BLOCKS, "attention.head_count": 2}
    for name, size in sizes.items():
        writer.add_uint32(f"clip.vision.{name}", size)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    random = np.random.default_rng(0)
    for name, shape in _shapes(n_embd).items():
        values = random.standard_normal(shape) * (0.3 if len(shape) > 1 else 0.1)
        writer.add_tensor(name, (values + name.endswith("ln1.weight")).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes(n_embd: int) -> dict[str, tuple[int, ...]]:
    patches = (_IMAGE // _PATCH) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "v.class_embd": (_N,),
        "v.patch_embd.weight": (_N, 3, _PATCH, _PATCH),
        "v.position_embd.weight": (patches + 1, _N),
        "v.pre_ln.weight": (_N,),
        "v.pre_ln.bias": (_N,),
        "mm.0.weight": (n_embd, _N),
        "mm.0.bias": (n_embd,),
        "mm.2.weight": (n_embd, n_embd),
        "mm.2.bias": (n_embd,),
    }
    for block in range(_BLOCKS):
        weights = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (_N, _N))
        weights |= {"ffn_up": (_FF, _N), "ffn_down": (_N, _FF)}
        for name, shape in weights.items():
            shapes[f"v.blk.{block}.{name}.weight"] = shape
            shapes[f"v.blk.{block}.{name}.bias"] = shape[:1]
        for name in ("ln1", "ln2"):
            shapes[f"v.blk.{block}.{name}.weight"] = (_N,)
            shapes[f"v.blk.{block}.{name}.bias"] = (_N,)
    return shapes


def write_png(path: Path, colour: tuple[int, int, int], size: int = _IMAGE) -> Path:
    """A square of one colour."""
    rows = b"".join(b"\0" + bytes(colour) * size for _ in range(size))
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    data = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path
