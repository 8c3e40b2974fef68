"""GGUF tensor types: ids, block sizes, which stock engine loads them, which need an imatrix; and menus of them.

Sizes are ggml's (ggml/src/ggml.c, type_traits); a native test compares them with the library's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from dynrun.errors import UsageError


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
# Types of the last year or of few backends. llama-quantize makes all of them, without an imatrix, where the rows fit:
# 32 columns (MXFP4), 64 (NVFP4, Q2_0), 128 (Q1_0), 256 (TQ1_0, TQ2_0).
_NEW = ("Q1_0", "TQ1_0", "TQ2_0", "Q2_0", "MXFP4", "NVFP4")


def _coarse_to_fine(types: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(types, key=lambda name: TENSOR_TYPES[name].bpw))


# By name: `k` has no types with codebooks, which are slow on CPUs and old GPUs; `arm` those that Arm CPUs repack.
MENUS: dict[str, tuple[str, ...]] = {
    "all": DEFAULT_MENU,
    "new": _coarse_to_fine((*DEFAULT_MENU, *_NEW)),
    "k": tuple(name for name in DEFAULT_MENU if not name.startswith("IQ")),
    "arm": ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
}
# What a tensor can be stored in; the others are formats of indices and of f64.
WEIGHT_TYPES = tuple(name for name in TENSOR_TYPES if name not in ("I8", "I16", "I32", "I64", "F64"))


def known_type(text: str, where: str) -> str:
    """The tensor type that ``text`` names, letter case aside; ``where`` begins the UsageError where there is none."""
    name = text.strip().upper()
    if name not in WEIGHT_TYPES:
        near = get_close_matches(name, WEIGHT_TYPES, n=1, cutoff=0.0)
        raise UsageError(f"{where}: unknown tensor type {text!r}", fix=f"the nearest is {near[0]}")
    return name


def parse_menu(text: str) -> tuple[str, ...]:
    """A menu by its name, or the types of a comma-separated list, coarse to fine. Raises UsageError."""
    if (named := MENUS.get(text.strip().lower())) is not None:
        return named
    where = f"--types {text}"
    words = [word for word in text.split(",") if word.strip()]
    if not words:
        raise UsageError(f"{where!r} names no type", fix=f"give types, or a menu: {', '.join(MENUS)}")
    if len(words) == 1 and words[0].strip().upper() not in WEIGHT_TYPES:
        near = get_close_matches(words[0].lower(), [*MENUS, *map(str.lower, WEIGHT_TYPES)], n=1, cutoff=0.0)[0]
        raise UsageError(
            f"{where}: no menu and no tensor type of that name",
            fix=f"the nearest is {near if near in MENUS else near.upper()}; menus: {', '.join(MENUS)}",
        )
    return _coarse_to_fine(sorted({known_type(word, where) for word in words}, key=WEIGHT_TYPES.index))


def substitutes(menu: Iterable[str], possible: Collection[str]) -> list[str]:
    """For a tensor that no type of ``menu`` can be given: for each of them the next finer of ``possible``.

    As llama-quantize does (Q4_K → Q5_0, Q6_K → Q8_0 for rows that are no multiple of 256), but by name, so that its
    own rule never fires, and with no more bits than needed (Q4_K → Q4_0). ``possible``: what the tensor can be given;
    of equal bits a type without a codebook is preferred, as the menu may have none for a reason. Empty where nothing
    is possible.
    """
    order = sorted(possible, key=lambda name: (TENSOR_TYPES[name].bpw, name.startswith("IQ"), name))
    found = {next((n for n in order if TENSOR_TYPES[n].bpw >= TENSOR_TYPES[t].bpw), order[-1]) for t in menu if order}
    return [name for name in order if name in found]
