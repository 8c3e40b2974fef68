"""The exact size of the file that llama-quantize will write, from the header of its input.

Follows llama_model_quantize_impl of src/llama-quant.cpp and gguf_write_out of ggml/src/gguf.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping

from dynrun.gguf.header import PREAMBLE_BYTES, Header, TensorInfo, padded
from dynrun.gguf.tensor_types import TENSOR_TYPES

_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


def string_entry_bytes(key: str, value: str) -> int:
    """Bytes of a metadata entry of type string."""
    return 8 + len(key.encode()) + 4 + 8 + len(value.encode())


def uint32_entry_bytes(key: str) -> int:
    """Bytes of a metadata entry of type uint32."""
    return 8 + len(key.encode()) + 4 + 4


def tensor_bytes(tensor: TensorInfo, type_name: str) -> int:
    """Bytes of a tensor's data in another type, padded as in the file."""
    return padded(TENSOR_TYPES[type_name].nbytes(tensor.n_elements), 32)


def metadata_bytes(header: Header, strings: Mapping[str, str], numbers: tuple[str, ...]) -> int:
    """Bytes before the data: the input's entries, with ``strings`` and the uint32 entries ``numbers`` set."""
    entries = {key: size for key, size in header.kv_bytes.items() if key not in _SPLIT_KEYS}
    for key in ("general.quantization_version", "general.file_type", *numbers):
        entries[key] = uint32_entry_bytes(key)
    for key, value in strings.items():
        entries[key] = string_entry_bytes(key, value)
    infos = sum(8 + len(name.encode()) + 4 + 8 * len(t.shape) + 4 + 8 for name, t in header.tensors.items())
    return padded(PREAMBLE_BYTES + sum(entries.values()) + infos, header.alignment)


def quantized_file_bytes(
    header: Header, types: Mapping[str, str], strings: Mapping[str, str], numbers: tuple[str, ...]
) -> int:
    """Bytes of the whole file when each tensor in ``types`` is stored as it says and all others as they are."""
    data = sum(tensor_bytes(tensor, types.get(name, tensor.type)) for name, tensor in header.tensors.items())
    return metadata_bytes(header, strings, numbers) + data
