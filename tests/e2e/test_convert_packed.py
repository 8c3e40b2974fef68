"""Safetensors whose weights are packed already: unpacked to the values that numpy finds, or refused with a reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynrun.gguf.header import read_header
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp.engine import Engine
from dynrun.models import open_reference
from tests.commands import dynrun
from tests.conversion import share_environment, users_environment
from tests.packed_weights import FORMS, REFUSED, Floats, Form, Stored, bf16, mxfp4
from tests.safetensors_files import load_tensors, save_tensors

pytestmark = pytest.mark.e2e
# llama's q and k come in another order.
_SAME = {
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.fixture(autouse=True)
def shared_environment(private_cache: Path) -> None:
    users_environment()
    share_environment(private_cache)


def packed_llama(tiny: Path, folder: Path, form: Form) -> dict[str, Floats]:
    """The tiny llama with random weights in ``form``; gives the values that they stand for, by GGUF's names."""
    random, wanted = np.random.default_rng(0), {}
    tensors: dict[str, Stored] = {}
    for name, stored in load_tensors(tiny / "llama" / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if "layers." not in name or "norm" in name:
            tensors[name] = stored
            continue
        packed = form.pack(random, *stored[1].shape)
        tensors |= {module + suffix: one for suffix, one in packed.tensors.items()}
        if (kind := module.rpartition(".")[2]) in _SAME:
            wanted[f"blk.{module.split('.')[2]}.{_SAME[kind]}.weight"] = packed.values
    write(tiny, folder, tensors, quantization_config=dict(form.config))
    return wanted


def write(tiny: Path, folder: Path, tensors: Mapping[str, Stored], **changes: Any) -> None:
    folder.mkdir()
    for name in _TOKENIZER:
        shutil.copy(tiny / "llama" / name, folder / name)
    config = json.loads((tiny / "llama" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_tensors(folder / "model.safetensors", tensors)


@pytest.mark.parametrize("name", FORMS)
def test_packed_weights_become_the_values_that_they_stand_for(tiny: Path, tmp_path: Path, name: str) -> None:
    wanted = packed_llama(tiny, tmp_path / name, FORMS[name])
    ran = dynrun("convert", tmp_path / name, "--json")
    assert ran.exit_code == 0, ran.stderr
    assert ran.json["type"] == "BF16"
    assert ran.json["findings"] == []
    assert abs(ran.json["size_bytes"] - ran.json["planned"]["result_bytes"]) < 0.01 * ran.json["size_bytes"]
    made = WeightFile(Path(ran.json["path"]))
    assert len(wanted) == 2 * len(_SAME)
    for tensor, values in wanted.items():
        assert np.array_equal(made.rows(tensor), bf16(values)), tensor
    with Engine.open(made.header.path, n_ctx=64, n_threads=2, n_gpu_layers=0) as engine:
        assert np.isfinite(engine.logits([1, 2, 3])).all()


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_converter_cannot_unpack_is_told_with_its_reason(tiny: Path, tmp_path: Path, name: str) -> None:
    form, reason = REFUSED[name]
    packed_llama(tiny, tmp_path / name, form)
    ran = dynrun("convert", tmp_path / name)
    assert ran.exit_code == 1
    assert "llama.cpp's converter cannot unpack these weights" in ran.error
    assert reason in ran.error
    assert "take the repository with the model's unquantized weights" in ran.error


GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "intermediate_size": 96,
    "num_experts_per_tok": 2,
    "sliding_window": 32,
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 256},
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
}


def gpt_oss(tiny: Path, folder: Path, n_layers: int = 2, width: int = 64, n_experts: int = 4) -> dict[str, Floats]:
    """A tiny gpt-oss, its experts in MXFP4; gives what they stand for, by GGUF's names."""
    random, wanted = np.random.default_rng(0), {}

    def plain(*shape: int, scale: float = 0.1) -> Stored:
        bits = bf16(random.standard_normal(shape) * scale).view(np.uint32) >> 16
        return "BF16", bits.astype(np.uint16)

    tensors = {"model.embed_tokens.weight": plain(49152, width), "lm_head.weight": plain(49152, width)}
    tensors["model.norm.weight"] = plain(width, scale=1)
    for layer in range(n_layers):
        at = f"model.layers.{layer}."
        tensors |= {f"{at}{norm}_layernorm.weight": plain(width, scale=1) for norm in ("input", "post_attention")}
        for kind, rows in (("q", 128), ("k", 64), ("v", 64), ("o", width)):
            shape = (rows, 128) if kind == "o" else (rows, width)
            tensors |= {
                f"{at}self_attn.{kind}_proj.weight": plain(*shape),
                f"{at}self_attn.{kind}_proj.bias": plain(rows),
            }
        tensors |= {f"{at}self_attn.sinks": plain(4), f"{at}mlp.router.weight": plain(n_experts, width)}
        tensors |= {f"{at}mlp.router.bias": plain(n_experts)}
        both, down = mxfp4(random, n_experts, 2 * 96, width), mxfp4(random, n_experts, width, 96)
        for kind, packed in (("gate_up_proj", both), ("down_proj", down)):
            tensors |= {f"{at}mlp.experts.{kind}{suffix}": one for suffix, one in packed.tensors.items()}
            tensors[f"{at}mlp.experts.{kind}_bias"] = plain(*packed.values.shape[:2])
        wanted |= {
            f"blk.{layer}.ffn_gate_exps.weight": both.values[:, ::2],
            f"blk.{layer}.ffn_up_exps.weight": both.values[:, 1::2],
            f"blk.{layer}.ffn_down_exps.weight": down.values,
        }
    write(tiny, folder, tensors, hidden_size=width, num_local_experts=n_experts, **GPT_OSS)
    return wanted


def test_mxfp4_stays_what_it_is_and_is_the_full_precision_of_what_is_made_of_it(tiny: Path, tmp_path: Path) -> None:
    wanted = gpt_oss(tiny, tmp_path / "oss")
    ran = dynrun("convert", tmp_path / "oss", "--json")
    assert ran.exit_code == 0, ran.stderr
    assert ran.json["type"] == "BF16"
    assert ran.json["findings"] == []
    assert abs(ran.json["size_bytes"] - ran.json["planned"]["result_bytes"]) < 0.01 * ran.json["size_bytes"]
    header = read_header(Path(ran.json["path"]))
    assert {header.tensors[name].type for name in wanted} == {"MXFP4"}
    reference = open_reference(str(tmp_path / "oss"))
    assert reference.quantized == ""
    made = WeightFile(reference.path)
    for name, values in wanted.items():
        assert np.array_equal(made.rows(name).reshape(values.shape), values), name
    with Engine.open(header.path, n_ctx=64, n_threads=2, n_gpu_layers=0) as engine:
        assert np.isfinite(engine.logits([1, 2, 3])).all()
