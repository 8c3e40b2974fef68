"""What the tensors of a source stand for: packed ones, and those of other parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dynrun.convert.failures import last_words
from dynrun.convert.folder import Source, read_folder
from dynrun.convert.plan import plan_conversion
from dynrun.convert.weights import packed_bits, weights_of
from dynrun.errors import UsageError
from tests.packed_weights import FORMS, compressed, mxfp4
from tests.safetensors_files import save_tensors, write_llama_folder, write_safetensors

MODULE = "model.layers.0.mlp.up_proj"


def source_of(folder: Path, tensors: dict[str, tuple[str, np.ndarray]], quantization: object) -> Source:
    write_llama_folder(folder, quantization_config=quantization)
    save_tensors(folder / "model.safetensors", tensors)
    return read_folder(folder)


@pytest.mark.parametrize("name", FORMS)
def test_a_packed_weight_counts_as_what_it_stands_for(tmp_path: Path, name: str) -> None:
    packed = FORMS[name].pack(np.random.default_rng(0), 128, 64)
    tensors = {MODULE + suffix: stored for suffix, stored in packed.tensors.items()}
    source = source_of(tmp_path / "m", tensors, dict(FORMS[name].config))
    (weight,) = weights_of(source)
    assert (weight.name, weight.n_elements) == (f"{MODULE}.weight", packed.values.size)
    assert plan_conversion(source).out_type == "bf16"


def test_what_llama_cpp_takes_packed_keeps_its_bytes(tmp_path: Path) -> None:
    packed = mxfp4(np.random.default_rng(0), 4, 64, 96)
    at = "model.layers.0.mlp.experts.down_proj"
    tensors = {at + suffix: stored for suffix, stored in packed.tensors.items()}
    source = source_of(tmp_path / "m", tensors, {"quant_method": "mxfp4"})
    blocks, scales = weights_of(source)
    assert (blocks.name, blocks.n_elements) == (at, packed.values.size)
    assert scales.n_elements == 0
    # 32 elements in 17 bytes, as GGUF has it.
    assert blocks.kept_bytes + scales.kept_bytes == packed.values.size // 32 * 17


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        (None, 8),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "gptq", "bits": 2}, 2),
        ({"quant_method": "gptq", "bits": "many"}, 8),
        ({"quant_method": "bitnet"}, 2),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4),
        (compressed("pack-quantized", num_bits=4), 4),
        ({"quant_method": "compressed-tensors", "config_groups": ["none"]}, 8),
    ],
)
def test_bits_of_an_element_are_the_configurations(quantization: object, bits: int) -> None:
    assert packed_bits({"quantization_config": quantization}) == bits


def test_parts_of_a_model_are_told_apart(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "m")
    with pytest.raises(UsageError, match="has no MTP head"):
        plan_conversion(read_folder(folder), "mtp")
    names = ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
    mtp = ["model.layers.2.eh_proj.weight", "model.layers.2.input_layernorm.weight", "mtp.fc.weight"]
    image = ["vision_tower.vision_model.encoder.layers.5.mlp.fc1.weight", "multi_modal_projector.linear.weight"]
    write_safetensors(folder / "model.safetensors", dict.fromkeys([*names, *mtp, *image], (64, 64)))
    source = read_folder(folder)
    found = {part: {weight.name for weight in weights_of(source, part)} for part in ("model", "mtp", "mmproj")}
    assert found["model"] == {*names, *mtp}
    assert found["mtp"] == {*names[:2], *mtp}
    assert found["mmproj"] == set(image)


def test_an_assertion_is_told_with_what_it_asserts() -> None:
    lines = ('  File "base.py", line 505, in dequant_model', "    assert bits in (2, 4)", "           ^^^^^^^^^^^^^^")
    assert last_words("\n".join(("Traceback", *lines, "AssertionError\n"))) == "AssertionError: assert bits in (2, 4)"
    assert last_words("AssertionError: no vision") == "AssertionError: no vision"


def test_a_layer_behind_the_last_is_of_the_text_models_configuration(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"text_config": config}))
    names = [f"model.language_model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    write_safetensors(folder / "model.safetensors", dict.fromkeys(names, (64, 64)))
    assert [weight.name for weight in weights_of(read_folder(folder), "mtp")] == names[2:]
