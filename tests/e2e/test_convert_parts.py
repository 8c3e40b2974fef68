"""The other parts of a model: its image encoder, and its multi-token-prediction head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dynrun.gguf.header import Header, read_header
from dynrun.gguf.weights import WeightFile
from tests.commands import dynrun
from tests.conversion import share_environment, users_environment
from tests.packed_weights import Stored
from tests.safetensors_files import load_tensors, save_tensors
from tests.tiny_mmproj import write_png

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def shared_environment(private_cache: Path) -> None:
    users_environment()
    share_environment(private_cache)


def values(stored: Stored) -> np.ndarray:
    """Of BF16."""
    assert stored[0] == "BF16"
    return (stored[1].astype(np.uint32) << 16).view(np.float32)


def with_mtp(source: Path, folder: Path) -> Path:
    """A copy whose last layer is there once more behind the last, with what makes it an MTP layer."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    last, width = config["num_hidden_layers"] - 1, config["hidden_size"]
    tensors = load_tensors(folder / "model.safetensors")
    kind, embedding = tensors["model.embed_tokens.weight"]
    new = {
        name.replace(f"layers.{last}.", f"layers.{last + 1}."): (stored[0], stored[1][::-1])
        for name, stored in tensors.items()
        if f"layers.{last}." in name
    }
    own = {"eh_proj": (width, 2 * width), "enorm": (width,), "hnorm": (width,), "shared_head.norm": (width,)}
    random = np.random.default_rng(0)
    for name, shape in own.items():
        bits = random.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16
        data = bits.astype(np.uint16) if kind == "BF16" else random.standard_normal(shape).astype(np.float32)
        new[f"model.layers.{last + 1}.{name}.weight"] = (kind, data)
    for name in ("embed_tokens", "shared_head.head"):
        new[f"model.layers.{last + 1}.{name}.weight"] = (kind, embedding[::-1])
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    save_tensors(folder / "model.safetensors", tensors | new)
    return folder


def data_of(header: Header, name: str) -> bytes:
    tensor = header.tensors[name]
    start = header.data_offset + tensor.offset
    return header.path.read_bytes()[start : start + tensor.nbytes]


def test_an_image_encoder_is_converted_and_sees(parts: Path, tmp_path: Path) -> None:
    model, mmproj = tmp_path / "tiny-BF16.gguf", tmp_path / "mmproj-tiny-BF16.gguf"
    for part, path in (("model", model), ("mmproj", mmproj)):
        ran = dynrun("convert", parts / "gemma3", "--part", part, "--out", path, "--json")
        assert ran.exit_code == 0, ran.stderr
        assert ran.json["findings"] == []
    made, source = WeightFile(mmproj), load_tensors(parts / "gemma3" / "model.safetensors")
    assert made.header.metadata["general.type"] == "mmproj"
    assert made.header.metadata["clip.projector_type"] == "gemma3"
    (name,) = (name for name in source if name.endswith("encoder.layers.1.mlp.fc1.weight"))
    assert np.array_equal(made.rows("v.blk.1.ffn_up.weight"), values(source[name]))
    images = [write_png(tmp_path / "red.png", (255, 0, 0)), write_png(tmp_path / "blue.png", (0, 0, 255))]
    given = []
    for arguments in ([], ["--image", images[0]], ["--image", images[1]]):
        common = ("run", model, "-p", "a", "-n", "8", "--temp", "0", "--ctx", "256", "--json")
        ran = dynrun(*common, *arguments)
        assert ran.exit_code == 0, ran.stderr
        given.append(ran.json)
    tokens = [one["timings"]["prompt_n"] for one in given]
    # Four of the image, and the text around it.
    assert tokens[1] == tokens[2] >= tokens[0] + 4


def test_an_mtp_head_is_of_the_model_and_a_file_of_its_own(parts: Path, tmp_path: Path) -> None:
    source = with_mtp(parts / "glm4_moe", tmp_path / "tiny")
    found = {}
    for part in ("model", "mtp"):
        ran = dynrun("convert", source, "--part", part, "--json")
        assert ran.exit_code == 0, ran.stderr
        assert ran.json["findings"] == []
        assert abs(ran.json["size_bytes"] - ran.json["planned"]["result_bytes"]) < 0.1 * ran.json["size_bytes"]
        found[part] = read_header(Path(ran.json["path"]))
        assert found[part].metadata["glm4moe.nextn_predict_layers"] == 1
        assert found[part].metadata["glm4moe.block_count"] == 3
    assert found["mtp"].path.name == "mtp-tiny-BF16.gguf"
    ends = {"token_embd.weight", "output_norm.weight", "output.weight"}
    behind = {name for name in found["model"].tensors if name.startswith("blk.2.")}
    assert "blk.2.nextn.eh_proj.weight" in behind
    assert found["mtp"].tensors.keys() == ends | behind
    for name in found["mtp"].tensors:
        assert data_of(found["mtp"], name) == data_of(found["model"], name), name


def test_a_part_that_is_not_there_or_not_taken_is_told(tiny: Path, tmp_path: Path) -> None:
    ran = dynrun("convert", tiny / "llama", "--part", "mtp")
    assert ran.exit_code == 2
    assert "has no MTP head" in ran.error
    ran = dynrun("convert", tiny / "llama", "--part", "mmproj")
    assert ran.exit_code == 1
    assert "llama.cpp's converter makes no such part of this architecture" in ran.error
    source = with_mtp(tiny / "deepseek_v3", tmp_path / "deepseek")
    ran = dynrun("convert", source, "--part", "mtp")
    assert ran.exit_code == 1
    assert "--mtp / --no-nextn are not supported for DeepseekV3ForCausalLM" in ran.error
    ran = dynrun("convert", source, "--json")
    assert ran.exit_code == 0, ran.stderr
    (finding,) = ran.json["findings"]
    assert finding.startswith("the converter leaves out this architecture's MTP head (")
