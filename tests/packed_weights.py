"""Weights in the packed forms of the Hub, random ones, with the values that numpy unpacks of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

GROUP = 32
Stored = tuple[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Packed:
    """``tensors``: suffix after the module's name → what is stored; ``values``: the weight, rows first."""

    tensors: Mapping[str, Stored]
    values: Floats


@dataclass(frozen=True)
class Form:
    """``config``: config.json's quantization_config; ``pack`` makes a random weight of a shape."""

    config: Mapping[str, Any]
    pack: Callable[[np.random.Generator, int, int], Packed]


def bf16(values: npt.NDArray[Any]) -> Floats:
    """Rounded to BF16, halves to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32)


def e4m3(codes: npt.NDArray[np.uint8]) -> Floats:
    """Values of 8-bit floats: 4 bits of exponent (bias 7), 3 of mantissa, no infinities."""
    sign, exponent, mantissa = codes >> 7, (codes >> 3) & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent.astype(int) - 7)
    small = np.ldexp(mantissa / 8, -6)
    return (np.where(exponent == 0, small, normal) * np.where(sign, -1, 1)).astype(np.float32)


def _codes(random: np.random.Generator, rows: int, columns: int) -> npt.NDArray[np.uint8]:
    codes = random.integers(0, 256, (rows, columns)).astype(np.uint8)
    return np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)


def _scales(random: np.random.Generator, *shape: int) -> Floats:
    return random.uniform(1e-4, 1e-2, shape).astype(np.float32)


def fp8_blocks(random: np.random.Generator, rows: int, columns: int) -> Packed:
    """DeepSeek's: a scale for each square; the last of a row and of a column may be cut."""
    n, codes = 48, _codes(random, rows, columns)
    scales = _scales(random, -(-rows // n), -(-columns // n))
    spread = scales.repeat(n, axis=0).repeat(n, axis=1)[:rows, :columns]
    return Packed({".weight": ("F8_E4M3", codes), ".weight_scale_inv": ("F32", scales)}, e4m3(codes) * spread)


def fp8_tensor(random: np.random.Generator, rows: int, columns: int) -> Packed:
    """Mistral's: one scale, and one of activations, which nobody needs here."""
    codes, scale = _codes(random, rows, columns), np.float32(0.003)
    tensors = {".weight": ("F8_E4M3", codes), ".weight_scale_inv": ("F32", np.array(scale))}
    return Packed({**tensors, ".activation_scale": ("F32", np.array(scale))}, e4m3(codes) * scale)


def fp8_channels(random: np.random.Generator, rows: int, columns: int) -> Packed:
    """compressed-tensors': a scale for each row."""
    codes, scales = _codes(random, rows, columns), _scales(random, rows, 1)
    return Packed({".weight": ("F8_E4M3", codes), ".weight_scale": ("F32", scales)}, e4m3(codes) * scales)


def _words(codes: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Eight 4-bit codes in a word, along the last axis, the first lowest."""
    eight = codes.reshape(*codes.shape[:-1], -1, 8).astype(np.uint32)
    shifted = eight << (4 * np.arange(8, dtype=np.uint32))
    return np.bitwise_or.reduce(shifted, axis=-1).view(np.int32)


def gptq(random: np.random.Generator, rows: int, columns: int) -> Packed:
    """4 bits with zero points, less one as they are stored; columns in an order of their own (act-order)."""
    codes = random.integers(0, 16, (columns, rows))
    zeros = random.integers(0, 15, (columns // GROUP, rows))
    scales = _scales(random, columns // GROUP, rows).astype(np.float16)
    group = random.permutation(np.repeat(np.arange(columns // GROUP), GROUP)).astype(np.int32)
    tensors = {
        ".qweight": ("I32", np.ascontiguousarray(_words(codes.T).T)),
        ".qzeros": ("I32", _words(zeros)),
        ".scales": ("F16", scales),
        ".g_idx": ("I32", group),
    }
    return Packed(tensors, (scales.astype(np.float32)[group] * (codes - (zeros[group] + 1))).T)


def int4_groups(random: np.random.Generator, rows: int, columns: int) -> Packed:
    """compressed-tensors' pack-quantized, symmetric."""
    codes = random.integers(0, 16, (rows, columns))
    scales = bf16(_scales(random, rows, columns // GROUP))
    tensors = {
        ".weight_packed": ("I32", _words(codes)),
        ".weight_scale": ("BF16", (scales.view(np.uint32) >> 16).astype(np.uint16)),
        ".weight_shape": ("I64", np.array([rows, columns])),
    }
    return Packed(tensors, (codes - 8) * scales.repeat(GROUP, axis=1))


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """compressed-tensors' configuration."""
    group = {"targets": ["Linear"], "weights": {"dynamic": False, "symmetric": True, **weights}}
    common = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}
    return {**common, "format": form, "config_groups": {"group_0": group}}


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": False}
FORMS: Mapping[str, Form] = {
    "fp8-blocks": Form({**_FP8, "weight_block_size": [48, 48]}, fp8_blocks),
    "fp8-tensor": Form({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}, fp8_tensor),
    "fp8-channels": Form(
        compressed("float-quantized", num_bits=8, type="float", strategy="channel", group_size=None), fp8_channels
    ),
    "gptq": Form(_GPTQ, gptq),
    "int4-groups": Form(
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP), int4_groups
    ),
}
# What llama.cpp's converter does not take, and what it says.
REFUSED: Mapping[str, tuple[Form, str]] = {
    "awq": (Form({"quant_method": "awq", "bits": 4, "group_size": GROUP}, gptq), "Quant method is not yet supported"),
    "gptq-3": (Form({**_GPTQ, "bits": 3}, gptq), "3-bit gptq dequantization is not yet implemented"),
    "fp8-compressed-tensor": (
        Form(compressed("float-quantized", num_bits=8, type="float", strategy="tensor", group_size=None), fp8_channels),
        'AssertionError: assert strategy == "channel" or strategy == "block"',
    ),
    "int4-channels": (
        Form(compressed("pack-quantized", num_bits=4, type="int", strategy="channel", group_size=None), int4_groups),
        'AssertionError: assert weight_config.get("strategy") == "group"',
    ),
}


# -- MXFP4 as gpt-oss has it -------------------------------------------------------------------------------------------

_MXFP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def mxfp4(random: np.random.Generator, *shape: int) -> Packed:
    """Experts, rows, columns: two codes in a byte, the first lower, and a power of two for each 32 columns."""
    codes = random.integers(0, 16, shape).astype(np.uint8)
    pairs = codes.reshape(*shape[:-1], shape[-1] // 32, 16, 2)
    powers = random.integers(116, 122, (*shape[:-1], shape[-1] // 32)).astype(np.uint8)
    scales = np.ldexp(np.float32(1), powers.astype(int) - 127).astype(np.float32)
    tensors = {"_blocks": ("U8", pairs[..., 0] | (pairs[..., 1] << 4)), "_scales": ("U8", powers)}
    return Packed(tensors, _MXFP4[codes] * scales.repeat(32, axis=-1))
