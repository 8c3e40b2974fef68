"""GGUF tensor types: ids, block sizes, which stock engine loads them, and which an imatrix is needed for.

Sizes are ggml's (ggml/src/ggml.c, type_traits); a native test compares them with the library's.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorType:
    """``block_size`` values are stored in ``type_size`` bytes."""

    name: str
    ggml_id: int
    block_size: int
    type_size: int
    needs_imatrix: bool = False

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return self.type_size * 8 / self.block_size

    def fits(self, row_length: int) -> bool:
        """Whether rows of ``row_length`` values can be stored in this type."""
        return row_length % self.block_size == 0

    def nbytes(self, n_elements: int) -> int:
        """Bytes of ``n_elements`` values in whole rows."""
        return n_elements // self.block_size * self.type_size


_ALL = (
    TensorType("F32", 0, 1, 4),
    TensorType("F16", 1, 1, 2),
    TensorType("Q4_0", 2, 32, 18),
    TensorType("Q4_1", 3, 32, 20),
    TensorType("Q5_0", 6, 32, 22),
    TensorType("Q5_1", 7, 32, 24),
    TensorType("Q8_0", 8, 32, 34),
    TensorType("Q2_K", 10, 256, 84),
    TensorType("Q3_K", 11, 256, 110),
    TensorType("Q4_K", 12, 256, 144),
    TensorType("Q5_K", 13, 256, 176),
    TensorType("Q6_K", 14, 256, 210),
    TensorType("IQ2_XXS", 16, 256, 66, True),
    TensorType("IQ2_XS", 17, 256, 74, True),
    TensorType("IQ3_XXS", 18, 256, 98, True),
    TensorType("IQ1_S", 19, 256, 50, True),
    TensorType("IQ4_NL", 20, 32, 18),
    TensorType("IQ3_S", 21, 256, 110),
    TensorType("IQ2_S", 22, 256, 82, True),
    TensorType("IQ4_XS", 23, 256, 136),
    TensorType("IQ1_M", 29, 256, 56, True),
    TensorType("BF16", 30, 1, 2),
    TensorType("TQ1_0", 34, 256, 54),
    TensorType("TQ2_0", 35, 256, 66),
    TensorType("MXFP4", 39, 32, 17),
    TensorType("NVFP4", 40, 64, 36),
    TensorType("Q1_0", 41, 128, 18),
    TensorType("Q2_0", 42, 64, 18),
    TensorType("I8", 24, 1, 1),
    TensorType("I16", 25, 1, 2),
    TensorType("I32", 26, 1, 4),
    TensorType("I64", 27, 1, 8),
    TensorType("F64", 28, 1, 8),
)
TENSOR_TYPES: dict[str, TensorType] = {t.name: t for t in _ALL}
TYPE_OF_ID: dict[int, TensorType] = {t.ggml_id: t for t in _ALL}
FULL_PRECISION = ("F32", "F16", "BF16")

# What every stock engine of the last two years loads, coarse to fine.
DEFAULT_MENU: tuple[str, ...] = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K", "IQ3_S", "IQ4_XS", "IQ4_NL"),
    *("Q4_0", "Q4_K", "Q4_1", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0", "F16"),
)
