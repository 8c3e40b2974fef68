"""Which tensors may be quantized to which types."""

from __future__ import annotations

import pytest

from dynrun.gguf.header import TensorInfo
from dynrun.gguf.quantizable import candidate_types, is_mtp, is_quantizable
from dynrun.gguf.tensor_types import DEFAULT_MENU, TENSOR_TYPES


def tensor(name: str, *shape: int) -> TensorInfo:
    return TensorInfo(name, "F16", shape, 0, 2)


@pytest.mark.parametrize(
    "name", ["token_embd.weight", "output.weight", "blk.3.attn_q.weight", "blk.0.ffn_up_exps.weight"]
)
def test_matrices_are_quantizable(name: str) -> None:
    assert is_quantizable(tensor(name, 256, 512), "llama")


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_norm.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.0.attn_q.bias",
        "position_embd.weight",
        "blk.0.ssm_conv1d.weight",
    ],
)
def test_what_llama_quantize_keeps_is_kept(name: str) -> None:
    assert not is_quantizable(tensor(name, 256, 512), "llama")


def test_vectors_are_kept() -> None:
    assert not is_quantizable(tensor("blk.0.attn_scale.weight", 256), "llama")


def test_an_architecture_has_its_own_exceptions() -> None:
    latent = tensor("blk.0.attn_k_b.weight", 256, 512)
    assert is_quantizable(latent, "deepseek2")
    assert not is_quantizable(latent, "glm5-next")


def test_rows_that_are_no_multiple_of_256_get_types_of_small_blocks() -> None:
    types = candidate_types(
        tensor("blk.0.attn_output.weight", 576, 768), DEFAULT_MENU, {"blk.0.attn_output.weight"}, {}
    )
    assert types == ["IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16"]


def test_types_that_need_an_imatrix_are_left_out_without_one() -> None:
    name = "blk.0.attn_q.weight"
    without = candidate_types(tensor(name, 768, 576), DEFAULT_MENU, set(), {})
    assert not [t for t in without if TENSOR_TYPES[t].needs_imatrix]
    assert set(candidate_types(tensor(name, 768, 576), DEFAULT_MENU, {name}, {})) == set(DEFAULT_MENU)


def test_embeddings_may_have_only_the_low_types_that_do_not_abort() -> None:
    types = candidate_types(tensor("token_embd.weight", 768, 49152), DEFAULT_MENU, set(), {})
    assert {"IQ3_XXS", "IQ2_S", "IQ1_M"} <= set(types)
    assert not {"IQ1_S", "IQ2_XXS", "IQ2_XS"} & set(types)


def test_mtp_blocks_are_kept_at_four_bits_or_more() -> None:
    metadata = {"general.architecture": "glm4moe", "glm4moe.block_count": 47, "glm4moe.nextn_predict_layers": 1}
    assert is_mtp("blk.46.attn_q.weight", metadata)
    assert not is_mtp("blk.45.attn_q.weight", metadata)
    types = candidate_types(tensor("blk.46.attn_q.weight", 1024, 1024), DEFAULT_MENU, set(), metadata)
    assert types
    assert min(TENSOR_TYPES[t].bpw for t in types) >= 4.5
    assert candidate_types(tensor("blk.46.attn_q.weight", 1024, 1024), ("Q2_K", "Q3_K"), set(), metadata) == ["Q4_0"]


def test_a_menu_that_fits_no_row_is_replaced_by_the_next_finer_types() -> None:
    name = "blk.0.attn_output.weight"
    assert candidate_types(tensor(name, 576, 768), ("Q4_K", "Q6_K"), {name}, {}) == ["Q4_0", "Q8_0"]
    # Of types that need an entry, what needs none.
    assert candidate_types(tensor("blk.0.attn_q.weight", 768, 8), ("IQ2_XXS",), set(), {}) == ["Q2_K"]
    assert candidate_types(tensor("blk.0.odd.weight", 33, 8), ("Q4_K",), set(), {}) == ["F16"]


def test_a_type_that_does_not_fit_is_no_candidate_even_alone() -> None:
    for one in DEFAULT_MENU:
        got = candidate_types(tensor("blk.0.attn_q.weight", 576, 8), [one], set(), {})
        assert (got == [one]) is (TENSOR_TYPES[one].fits(576) and not TENSOR_TYPES[one].needs_imatrix)


def test_a_row_of_no_known_block_stays_f16() -> None:
    assert candidate_types(tensor("blk.0.odd.weight", 33, 8), DEFAULT_MENU, set(), {}) == ["F16"]
