"""Known faults, planted one by one in a good model: each is found under its name, and the good model has none."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dynrun.errors import DynrunError
from dynrun.gguf.header import Header, read_header
from dynrun.lint.config import check_config
from dynrun.lint.finding import Finding, Subject
from dynrun.lint.provenance import check_provenance
from dynrun.lint.rope import check_rope, llama3_factors
from dynrun.lint.rules import lint
from dynrun.lint.shapes import check_shapes
from dynrun.lint.source import lint_file
from dynrun.lint.template import KEY, check_template
from dynrun.lint.tokens import check_tokens
from tests.shapes import NAMES, shape_header
from tests.tiny import CHAT_TEMPLATE, write_tiny_llama

Rule = Callable[[Subject], Iterator[Finding]]
DROP = object()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Header:
    return read_header(write_tiny_llama(tmp_path_factory.mktemp("lint") / "tiny.gguf", n_expert=4))


def changed(header: Header, **metadata: Any) -> Header:
    """With other values under keys whose dots are written as __; DROP takes one out."""
    new = {**header.metadata, **{key.replace("__", "."): value for key, value in metadata.items()}}
    return replace(header, metadata={key: value for key, value in new.items() if value is not DROP})


def found(rule: Rule, header: Header, config: Mapping[str, Any] | None = None, read: Any = None) -> dict[str, Finding]:
    return {finding.id: finding for finding in rule(Subject(header, config or {}, read))}


def test_a_good_model_has_only_remarks(good: Header) -> None:
    assert [finding for finding in lint(good) if finding.severity != "info"] == []


@pytest.mark.parametrize("name", NAMES)
def test_well_known_models_have_the_shapes_of_their_architecture(name: str) -> None:
    assert list(check_shapes(Subject(shape_header(name, "Q8_0"), {}))) == []


class TestTemplate:
    def ids(self, good: Header, template: Any, **more: Any) -> set[str]:
        return set(found(check_template, changed(good, **{KEY.replace(".", "__"): template}, **more)))

    def test_the_good_one(self, good: Header) -> None:
        assert self.ids(good, CHAT_TEMPLATE) == set()

    def test_none(self, good: Header) -> None:
        assert self.ids(good, DROP) == {"template-missing"}

    def test_empty(self, good: Header) -> None:
        assert self.ids(good, " ") == {"template-empty"}

    @pytest.mark.parametrize("broken", ["{% for %}", "{{ raise_exception('no') }}", "{{ messages.wings.span }}"])
    def test_broken(self, broken: str, good: Header) -> None:
        assert self.ids(good, broken) == {"template-broken"}

    def test_messages_left_out(self, good: Header) -> None:
        assert "template-content" in self.ids(good, "{{ messages[-1]['content'] }}<|im_end|>")

    def test_no_beginning_of_the_answer(self, good: Header) -> None:
        cut = CHAT_TEMPLATE.partition("{% if add_generation_prompt")[0]
        assert self.ids(good, cut) == {"template-no-prompt"}

    def test_turns_that_end_where_the_model_does_not_stop(self, good: Header) -> None:
        tokens = [token.replace("<|im_end|>", "<|done|>") for token in good.metadata["tokenizer.ggml.tokens"]]
        template = CHAT_TEMPLATE.replace("<|im_end|>", "<|done|>")
        eos = {"tokenizer__ggml__eos_token_id": tokens.index("<|endoftext|>")}
        assert self.ids(good, template, tokenizer__ggml__tokens=tokens, **eos) == {"eot-mismatch"}
        eot = {"tokenizer__ggml__eot_token_id": tokens.index("<|done|>")}
        assert self.ids(good, template, tokenizer__ggml__tokens=tokens, **eos, **eot) == set()

    def test_special_tokens_that_are_none(self, good: Header) -> None:
        template = CHAT_TEMPLATE.replace("<|im_start|>", "<|start_header_id|>")
        assert self.ids(good, template) == {"template-unknown-token"}

    def test_a_system_message_that_disappears(self, good: Header) -> None:
        template = CHAT_TEMPLATE.replace("in messages %}", "in messages if message['role'] != 'system' %}")
        assert self.ids(good, template) == {"template-system"}


class TestTokens:
    TABLE: tuple[tuple[str, dict[str, Any]], ...] = (
        ("vocabulary-missing", {"tokenizer__ggml__model": DROP}),
        ("vocabulary-missing", {"tokenizer__ggml__tokens": DROP}),
        ("vocabulary-lengths", {"tokenizer__ggml__token_type": [1, 2, 3]}),
        ("vocabulary-embeddings", {"tokenizer__ggml__tokens": ["a", "b"], "tokenizer__ggml__token_type": [3, 3]}),
        ("token-out-of-range", {"tokenizer__ggml__eot_token_id": 1 << 20}),
        ("token-out-of-range", {"tokenizer__ggml__padding_token_id": -1}),
        ("token-out-of-range", {"tokenizer__ggml__eos_token_id": "x"}),
        ("eos-missing", {"tokenizer__ggml__eos_token_id": DROP}),
        ("eos-not-control", {"tokenizer__ggml__eos_token_id": 5}),
        ("bos-missing", {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__bos_token_id": DROP}),
    )

    @pytest.mark.parametrize(("name", "metadata"), TABLE)
    def test_each_fault_is_found(self, name: str, metadata: dict[str, Any], good: Header) -> None:
        assert found(check_tokens, changed(good, **metadata))[name].severity == "error"

    def test_the_good_one(self, good: Header) -> None:
        assert found(check_tokens, good) == {}

    def test_padding_that_is_eos(self, good: Header) -> None:
        eos = good.metadata["tokenizer.ggml.eos_token_id"]
        assert set(found(check_tokens, changed(good, tokenizer__ggml__padding_token_id=eos))) == {"padding-is-eos"}


class TestRope:
    TABLE: tuple[tuple[str, dict[str, Any]], ...] = (
        ("context-missing", {"llama__context_length": DROP}),
        ("context-missing", {"llama__context_length": "long"}),
        ("rope-type", {"llama__rope__scaling__type": "spiral"}),
        ("rope-factor", {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": -1.0}),
        ("rope-factor", {"llama__rope__scaling__type": "linear"}),
        ("rope-original", {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0}),
        ("rope-base", {"llama__rope__freq_base": 0.0}),
        (
            "context-beyond-rope",
            {
                "llama__rope__scaling__type": "yarn",
                "llama__rope__scaling__factor": 4.0,
                "llama__rope__scaling__original_context_length": 256,
            },
        ),
    )

    @pytest.mark.parametrize(("name", "metadata"), TABLE)
    def test_each_fault_is_found(self, name: str, metadata: dict[str, Any], good: Header) -> None:
        assert name in found(check_rope, changed(good, **metadata))

    def test_yarn_that_reaches_the_context_is_right(self, good: Header) -> None:
        scaling = {
            "llama__rope__scaling__type": "yarn",
            "llama__rope__scaling__factor": 8.0,
            "llama__rope__scaling__original_context_length": 256,
        }
        assert found(check_rope, changed(good, **scaling)) == {}


SCOUT = {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 8192}
LLAMA_31 = {**SCOUT, "factor": 8.0, "high_freq_factor": 4.0, "rope_type": "llama3"}


def packed(factors: list[float]) -> bytes:
    return struct.pack(f"<{len(factors)}f", *factors)


@cache
def scout() -> Header:
    return shape_header("llama-4-scout", "Q8_0")


class TestLlama4:
    def test_the_official_factors_are_right(self) -> None:
        right = packed(llama3_factors(SCOUT, 500000.0, 128))
        assert found(check_rope, scout(), read=lambda name: right) == {}

    def test_those_of_the_first_release_are_not(self) -> None:
        wrong = packed(llama3_factors({**SCOUT, "factor": 8.0, "high_freq_factor": 4.0}, 500000.0, 128))
        finding = found(check_rope, scout(), read=lambda name: wrong)["llama4-rope"]
        assert finding.severity == "error"
        assert "of 64 differ" in finding.found

    def test_none_are_not_either(self) -> None:
        bare = replace(scout(), tensors={k: t for k, t in scout().tensors.items() if k != "rope_freqs.weight"})
        assert found(check_rope, bare)["llama4-rope"].found.startswith("none")

    def test_maverick_has_none(self) -> None:
        assert found(check_rope, changed(scout(), llama4__expert_count=128))["llama4-rope"].severity == "error"

    def test_the_epsilon_of_early_converters_is_found(self) -> None:
        assert found(check_config, scout()) == {}
        early = changed(scout(), llama4__attention__layer_norm_rms_epsilon=1e-6)
        assert found(check_config, early)["llama4-epsilon"].found == "1e-06"

    def test_llama_31s_factors_are_those_of_its_config(self, good: Header) -> None:
        config = {"rope_scaling": LLAMA_31}
        assert found(check_rope, good, config)["llama3-rope"].severity == "error"


def test_llama3_factors_are_those_of_the_converter() -> None:
    """Of Llama 3.1 8B: 1 for short waves, the factor for long ones, growing between. By hand, number 30: the wave is
    2π·500000^(60/128) = 2948 long, s = (8192/2948 - 1) / 3 = 0.593, 1 / ((1 - s) / 8 + s) = 1.553."""
    factors = llama3_factors(LLAMA_31, 500000.0, 128)
    assert (factors[0], factors[-1]) == (1.0, 8.0)
    assert factors == sorted(factors)
    assert factors[28] == 1.0
    assert factors[30] == pytest.approx(1.553, abs=0.001)


class TestConfig:
    RIGHT: Mapping[str, Any] = {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
    }

    def test_the_right_one(self, good: Header) -> None:
        assert found(check_config, good, self.RIGHT) == {}

    @pytest.mark.parametrize("name", [name for name in RIGHT if name != "max_position_embeddings"])
    def test_each_number_is_compared(self, name: str, good: Header) -> None:
        finding = found(check_config, good, {**self.RIGHT, name: self.RIGHT[name] * 2})["config-differs"]
        assert finding.severity == "error"
        assert name in finding.expected

    def test_a_context_beyond_the_models(self, good: Header) -> None:
        assert set(found(check_config, good, {"max_position_embeddings": 1024})) == {"context-beyond-config"}

    def test_numbers_that_are_none_are_left_alone(self, good: Header) -> None:
        assert found(check_config, good, dict.fromkeys(self.RIGHT, "many")) == {}

    def test_the_latent_head_of_mla_is_no_fault(self) -> None:
        config = {"num_key_value_heads": 128, "n_routed_experts": 256}
        assert found(check_config, shape_header("deepseek-v3", "Q8_0"), config) == {}


class TestShapes:
    def without(self, header: Header, *names: str) -> Header:
        return replace(header, tensors={k: t for k, t in header.tensors.items() if k not in names})

    def test_a_layer_is_missing(self, good: Header) -> None:
        names = [name for name in good.tensors if name.startswith("blk.1.")]
        assert found(check_shapes, self.without(good, *names))["blocks-missing"].key == "blk.1"

    def test_a_layer_too_many(self, good: Header) -> None:
        assert "blocks-too-many" in found(check_shapes, changed(good, llama__block_count=1))

    def test_one_layer_lacks_what_all_others_have(self) -> None:
        header = shape_header("gemma-3-27b", "Q8_0")
        name = "blk.17.attn_k_norm.weight"
        assert found(check_shapes, self.without(header, name))["tensor-missing"].key == name

    @pytest.mark.parametrize(
        "key", ["embedding_length", "attention__head_count_kv", "feed_forward_length", "expert_count"]
    )
    def test_shapes_against_metadata(self, key: str, good: Header) -> None:
        finding = found(check_shapes, changed(good, **{f"llama__{key}": 8}))["tensor-shape"]
        assert finding.severity == "error"

    def test_no_embeddings(self, good: Header) -> None:
        assert found(check_shapes, self.without(good, "token_embd.weight"))["tensor-missing"].key == "token_embd.weight"


class TestProvenance:
    def quantized(self, good: Header, kind: str, **metadata: Any) -> Header:
        weights = {k: replace(t, type=kind) if len(t.shape) > 1 else t for k, t in good.tensors.items()}
        return changed(replace(good, tensors=weights), **metadata)

    def test_full_precision_needs_none(self, good: Header) -> None:
        assert found(check_provenance, good) == {}

    def test_a_coarse_type_without_an_imatrix(self, good: Header) -> None:
        finding = found(check_provenance, self.quantized(good, "IQ2_XXS"))["imatrix-missing"]
        assert finding.severity == "warning"

    def test_a_fine_one_is_only_a_remark(self, good: Header) -> None:
        finding = found(check_provenance, self.quantized(good, "Q6_K"))["imatrix-missing"]
        assert finding.severity == "info"

    def test_an_imatrix_of_few_chunks_from_somebodys_home(self, good: Header) -> None:
        imatrix = {
            "quantize__imatrix__file": "/home/me/imatrix.dat",
            "quantize__imatrix__chunks_count": 3,
            "general__file_type": 18,
        }
        header = self.quantized(good, "Q6_K", **imatrix)
        assert set(found(check_provenance, header)) == {"imatrix-small", "path-leaked"}

    def test_a_made_file_without_its_scheme(self, good: Header) -> None:
        header = self.quantized(good, "Q4_K", dynrun__version="0.1.0", quantize__imatrix__file="imatrix.gguf")
        assert found(check_provenance, header)["scheme-provenance"].severity == "warning"

    def test_a_file_type_of_another_precision(self, good: Header) -> None:
        header = self.quantized(good, "Q4_K", quantize__imatrix__file="imatrix.gguf", general__file_type=1)
        assert found(check_provenance, header)["file-type"].severity == "warning"


class TestFiles:
    def test_the_config_beside_a_file_is_read(self, tmp_path: Path) -> None:
        path = write_tiny_llama(tmp_path / "m.gguf")
        assert lint_file(path).config == ""
        (tmp_path / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 3}}))
        report = lint_file(path)
        assert report.config == str(tmp_path / "config.json")
        assert [finding.id for finding in report.findings if finding.severity == "error"] == ["config-differs"]

    @pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
    def test_a_config_that_is_none_is_said(self, text: str, tmp_path: Path) -> None:
        path = write_tiny_llama(tmp_path / "m.gguf")
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DynrunError, match=r"config\.json is no"):
            lint_file(path)

    def test_values_of_any_kind_are_no_crash(self, good: Header) -> None:
        for value in (None, [], ["x"], "x", -1, 1 << 63, float("nan"), float("inf"), True, {}):
            for key in good.metadata:
                if key != "general.architecture" and not key.startswith("tokenizer.chat"):
                    header = replace(good, metadata={**good.metadata, key: value})
                    for rule in (check_tokens, check_rope, check_config, check_shapes, check_provenance):
                        list(rule(Subject(header, {"num_hidden_layers": value, "rope_scaling": value})))
