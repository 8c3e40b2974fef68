"""Numbers of the header against the repository's config.json, and those that Llama 4 must have without one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from dynrun.lint.finding import Finding, Subject, number_of, shown

# Names in config.json, of which the first that is there counts, and the header's key.
_PAIRS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("hidden_size", "n_embd", "d_model"), "embedding_length"),
    (("num_attention_heads", "n_head"), "attention.head_count"),
    (("num_key_value_heads",), "attention.head_count_kv"),
    (("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), "expert_count"),
    (("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), "expert_used_count"),
    (("rms_norm_eps", "norm_eps"), "attention.layer_norm_rms_epsilon"),
    (("layer_norm_eps", "layer_norm_epsilon"), "attention.layer_norm_epsilon"),
    (("rope_theta",), "rope.freq_base"),
)
# What llama.cpp's converters write otherwise than config.json has it.
_MLA_DIFFERS = frozenset({"attention.head_count_kv"})
_QK_NORM_EPSILON = 1e-5


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that is the language model's."""
    for name in ("text_config", "llm_config", "language_config"):
        if isinstance(inner := config.get(name), dict):
            return inner
    return config


def check_config(subject: Subject) -> Iterator[Finding]:
    """Raises nothing: a config.json of another form has nothing to compare."""
    if subject.config:
        yield from _numbers(subject)
        yield from _layers(subject)
        yield from _context(subject)
    if subject.architecture == "llama4":
        yield from _llama4(subject)


def _numbers(subject: Subject) -> Iterator[Finding]:
    is_mla = subject.number("attention.key_length_mla") is not None
    for names, key in _PAIRS:
        if is_mla and key in _MLA_DIFFERS:
            continue
        name = next((name for name in names if number_of(subject.config.get(name)) is not None), None)
        found = subject.number(key)
        if name is None or found is None:
            continue
        expected = number_of(subject.config[name])
        if expected is not None and not math.isclose(expected, found, rel_tol=1e-5):
            said = f"{expected:g}, {name} of config.json"
            yield Finding("config-differs", "error", subject.key(key), said, f"{found:g}")


def _layers(subject: Subject) -> Iterator[Finding]:
    expected = number_of(subject.config.get("num_hidden_layers"))
    found = subject.count("block_count")
    n_mtp = subject.count("nextn_predict_layers")
    if expected is not None and expected not in (found, found - n_mtp):
        said = f"{expected:g}, num_hidden_layers of config.json"
        yield Finding("config-differs", "error", subject.key("block_count"), said, f"{found}")


def _context(subject: Subject) -> Iterator[Finding]:
    expected = number_of(subject.config.get("max_position_embeddings"))
    found = subject.number("context_length")
    if expected and found and found > expected * 1.01:
        said = f"at most {expected:g}, max_position_embeddings of config.json"
        yield Finding("context-beyond-config", "warning", subject.key("context_length"), said, f"{found:g}")


def _llama4(subject: Subject) -> Iterator[Finding]:
    """llama.cpp normalizes Q and K of Llama 4 with this epsilon; early converters wrote another one."""
    key = "attention.layer_norm_rms_epsilon"
    found = subject.number(key)
    if found is None or not math.isclose(found, _QK_NORM_EPSILON, rel_tol=1e-3):
        said = shown(found if found is not None else "none")
        yield Finding("llama4-epsilon", "error", subject.key(key), "1e-05, also for the norm of Q and K", said)
