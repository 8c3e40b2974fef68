"""What the planner reads out of headers: layers, caches of every kind; of hostile ones an error for people at worst."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrun.errors import DynrunError, UsageError
from dynrun.lint.rules import lint
from dynrun.runtime.cache_shape import LayerCache, layer_caches
from dynrun.runtime.memory import cache_bytes, cells, checkpoint_bytes, n_checkpoints
from dynrun.runtime.model_facts import facts_of
from dynrun.runtime.placement import Choice, Wishes
from dynrun.runtime.plan import plan
from tests.shapes import NAMES, preset_types, shape_header
from tests.unit.test_plan import MACHINES


def metadata(architecture: str, n_layer: int = 8, **values: Any) -> dict[str, Any]:
    """Of a model with heads of 64; keys have __ for dots."""
    plain = {
        "block_count": n_layer,
        "embedding_length": 512,
        "attention__head_count": 8,
        "attention__head_count_kv": 2,
        **values,
    }
    named = {f"{architecture}.{key.replace('__', '.')}": value for key, value in plain.items()}
    return {"general.architecture": architecture, **named}


def windows(architecture: str, n_layer: int = 8, **values: Any) -> list[int]:
    return [cache.window for cache in layer_caches(metadata(architecture, n_layer, **values))]


class TestCaches:
    def test_plain_attention(self) -> None:
        assert layer_caches(metadata("llama")) == (LayerCache(k=128, v=128),) * 8

    def test_heads_of_another_size(self) -> None:
        given_sizes = {"attention__key_length": 96, "attention__value_length": 32}
        assert layer_caches(metadata("llama", 1, **given_sizes)) == (LayerCache(k=192, v=64),)

    @pytest.mark.parametrize(
        ("architecture", "values", "dense"),
        [
            ("gemma3", {"attention__sliding_window": 1024}, [5]),
            ("gemma2", {}, [1, 3, 5, 7]),
            ("gpt-oss", {"attention__sliding_window": 128}, [1, 3, 5, 7]),
            ("llama4", {}, [3, 7]),
            ("cohere2", {"attention__sliding_window": 4096}, [3, 7]),
            ("cohere2moe", {"attention__sliding_window": 4096}, [0, 4]),
            ("gemma3", {"attention__sliding_window": 1024, "attention__sliding_window_pattern": 2}, [1, 3, 5, 7]),
            ("gemma3", {}, list(range(8))),
            ("llama4", {"attention__sliding_window": 0}, list(range(8))),
            ("exaone4", {}, list(range(8))),
            ("qwen2", {"attention__sliding_window": 4096}, list(range(8))),
            ("phi3", {"attention__sliding_window": 2048}, list(range(8))),
            (
                "gemma4",
                {"attention__sliding_window": 512, "attention__sliding_window_pattern": [True] * 7 + [False]},
                [7],
            ),
        ],
    )
    def test_windows_as_the_architecture_has_them(
        self, architecture: str, values: dict[str, Any], dense: list[int]
    ) -> None:
        assert [layer for layer, window in enumerate(windows(architecture, **values)) if not window] == dense

    def test_llama_4s_window_is_fixed(self) -> None:
        assert set(windows("llama4", attention__sliding_window=77)) == {0, 8192}

    def test_mla_keeps_one_latent_vector(self) -> None:
        lengths = {"attention__key_length": 576, "attention__value_length": 512, "attention__head_count_kv": 1}
        mla = {**lengths, "attention__key_length_mla": 192, "attention__value_length_mla": 128}
        assert layer_caches(metadata("deepseek2", 1, **mla)) == (LayerCache(k=576, v=0),)
        assert layer_caches(metadata("deepseek2", 1, **lengths)) == (LayerCache(k=576, v=512),)

    def test_recurrent_layers_have_a_state_and_no_cache(self) -> None:
        ssm = {"ssm__conv_kernel": 4, "ssm__inner_size": 1024, "ssm__state_size": 16}
        assert layer_caches(metadata("mamba", 1, **ssm)) == (LayerCache(state=3 * 1024 + 16 * 1024),)

    def test_hybrids_by_interval(self) -> None:
        ssm = {"ssm__conv_kernel": 4, "ssm__inner_size": 1024, "ssm__state_size": 128, "ssm__group_count": 4}
        caches = layer_caches(metadata("qwen3next", **ssm))
        assert [bool(cache.k) for cache in caches] == [False, False, False, True] * 2
        assert caches[0].state == 3 * (1024 + 2 * 4 * 128) + 128 * 1024

    def test_hybrids_by_heads(self) -> None:
        caches = layer_caches(metadata("lfm2", 4, attention__head_count_kv=[0, 2, 0, 2], shortconv__l_cache=3))
        assert [(bool(cache.k), cache.state) for cache in caches] == [(False, 1024), (True, 0)] * 2

    def test_layers_that_share_anothers_cache_have_none(self) -> None:
        assert [bool(cache.k) for cache in layer_caches(metadata("gemma3n", 30))] == [True] * 20 + [False] * 10

    def test_mtp_blocks_have_none(self) -> None:
        caches = layer_caches(metadata("glm4moe", 8, nextn_predict_layers=1))
        assert [bool(cache.k) for cache in caches] == [True] * 7 + [False]

    def test_encoders_have_none(self) -> None:
        assert set(layer_caches(metadata("bert"))) == {LayerCache()}


class TestMemory:
    def test_contexts_are_padded_to_256_cells(self) -> None:
        assert [cells(Choice(n)) for n in (1, 256, 257, 4096)] == [256, 256, 512, 4096]

    def test_a_window_and_a_batch_are_all_that_is_kept(self) -> None:
        assert cells(Choice(32768), window=1024) == 1536
        assert cells(Choice(1024), window=4096) == 1024

    def test_each_slot_has_its_own(self) -> None:
        cache = LayerCache(k=128, v=128, state=10)
        assert cache_bytes(cache, Choice(1024, 3)) == 3 * (1024 * 256 * 2 + 40)

    def test_checkpoints_are_for_windows_and_states_only(self) -> None:
        gemma, qwen = (facts_of(shape_header(name, "Q8_0")) for name in ("gemma-3-27b", "qwen3-235b-a22b"))
        assert n_checkpoints(qwen, Choice(32768)) == 0
        assert n_checkpoints(gemma, Choice(32768, 2)) == 8
        assert checkpoint_bytes(gemma, Choice(32768)) == 52 * 1024 * 2 * 16 * 128 * 2


class TestFacts:
    @pytest.mark.parametrize("name", NAMES)
    def test_every_byte_is_somewhere(self, name: str) -> None:
        header = shape_header(name, "Q8_0")
        assert facts_of(header).weight_bytes == sum(tensor.nbytes for tensor in header.tensors.values())

    def test_a_tied_output_is_read_twice_and_stored_once(self) -> None:
        gemma = facts_of(shape_header("gemma-3-27b", "Q8_0"))
        assert gemma.output_copy_bytes == gemma.input_bytes
        assert gemma.output_bytes > gemma.output_copy_bytes
        assert facts_of(shape_header("llama-4-scout", "Q8_0")).output_copy_bytes == 0

    def test_shared_experts_are_no_experts(self) -> None:
        scout = facts_of(shape_header("llama-4-scout", "Q8_0"))
        assert len(scout.moe_layers) == 48
        assert scout.layers[0].expert_bytes == 3 * 5120 * 8192 * 16 * 34 // 32
        assert facts_of(shape_header("deepseek-v3", "Q8_0")).moe_layers == tuple(range(3, 61))

    def test_the_main_type_is_that_of_most_bytes(self) -> None:
        types = preset_types("gpt-oss-120b", "MXFP4_MOE")
        assert facts_of(shape_header("gpt-oss-120b", types)).main_type == "MXFP4"

    def test_what_is_no_language_model_is_a_usage_error(self) -> None:
        header = shape_header("gemma-3-27b", "Q8_0")
        for bad in (replace(header, tensors={}), replace(header, metadata={})):
            with pytest.raises(UsageError, match="holds no language model"):
                facts_of(bad)


@cache
def whole(name: str) -> Any:
    return shape_header(name, "Q8_0")


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), 1 << 64),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-1, 1 << 40), st.booleans(), st.text(max_size=2)), max_size=70),
)


@given(name=st.sampled_from(NAMES), place=st.integers(0, 30), value=VALUES, other=st.integers(0, 30), more=VALUES)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_any_metadata_are_planned_and_linted_or_refused(
    name: str, place: int, value: Any, other: int, more: Any
) -> None:
    header = whole(name)
    keys = [key for key in header.metadata if key != "general.architecture"]
    changed = {**header.metadata, keys[place % len(keys)]: value, keys[other % len(keys)]: more}
    hostile = replace(header, metadata={key: one for key, one in changed.items() if one is not None})
    message = ""
    try:
        plan(facts_of(hostile), MACHINES["desktop-24-64"], Wishes())
    except DynrunError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
    assert lint(hostile) is not None
