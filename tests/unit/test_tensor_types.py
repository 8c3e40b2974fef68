"""The table of tensor types, against the gguf package's constants and the rules of the default menu."""

from __future__ import annotations

import gguf
import pytest

from dynrun.gguf.tensor_types import DEFAULT_MENU, FULL_PRECISION, TENSOR_TYPES, TYPE_OF_ID, TensorType

# Types that no file holds: q8_1 and q8_K are formats of activations.
NOT_IN_FILES = {"Q8_1", "Q8_K"}


def test_every_type_of_the_gguf_package_is_known() -> None:
    assert {kind.name for kind in gguf.GGMLQuantizationType} - NOT_IN_FILES == set(TENSOR_TYPES)


@pytest.mark.parametrize("kind", TENSOR_TYPES.values(), ids=lambda kind: kind.name)
def test_ids_and_sizes_are_those_of_the_gguf_package(kind: TensorType) -> None:
    same = gguf.GGMLQuantizationType[kind.name]
    assert kind.ggml_id == same.value
    assert (kind.block_size, kind.type_size) == gguf.GGML_QUANT_SIZES[same]
    assert TYPE_OF_ID[same.value] is kind


@pytest.mark.parametrize(
    ("name", "bpw"),
    [
        ("F16", 16),
        ("Q8_0", 8.5),
        ("Q6_K", 6.5625),
        ("Q4_K", 4.5),
        ("Q3_K", 3.4375),
        ("Q2_K", 2.625),
        ("IQ2_XXS", 2.0625),
    ],
)
def test_bits_per_weight(name: str, bpw: float) -> None:
    assert TENSOR_TYPES[name].bpw == bpw


def test_rows_fit_in_whole_blocks() -> None:
    assert TENSOR_TYPES["Q4_K"].fits(768)
    assert not TENSOR_TYPES["Q4_K"].fits(576)
    assert TENSOR_TYPES["Q4_0"].fits(576)
    assert TENSOR_TYPES["F16"].fits(7)
    assert TENSOR_TYPES["Q4_K"].nbytes(768 * 2) == 6 * 144


def test_the_menu_is_what_stock_engines_load_from_coarse_to_fine() -> None:
    assert len(set(DEFAULT_MENU)) == len(DEFAULT_MENU)
    bits = [TENSOR_TYPES[name].bpw for name in DEFAULT_MENU]
    assert bits == sorted(bits)
    assert not {"MXFP4", "NVFP4", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0", "BF16", "F32"} & set(DEFAULT_MENU)
    assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16"} <= set(DEFAULT_MENU)


def test_the_types_that_need_an_imatrix_are_those_that_llama_quantize_refuses_without() -> None:
    needing = {kind.name for kind in TENSOR_TYPES.values() if kind.needs_imatrix}
    assert needing == {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}


def test_full_precision_types_have_no_blocks() -> None:
    assert all(TENSOR_TYPES[name].block_size == 1 for name in FULL_PRECISION)
