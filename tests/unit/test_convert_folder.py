"""What may be converted, and what is refused before anything of it is used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dynrun.convert.folder import INDEX, is_model_folder, read_folder, wanted_of
from dynrun.convert.plan import following_bytes, out_type_of, plan_conversion
from dynrun.convert.stage import Wishes, check_code, known_conversion
from dynrun.convert.weights import weights_of
from dynrun.errors import DoesNotFitError, DynrunError, NotFoundError, UsageError
from tests.safetensors_files import LLAMA_CONFIG, llama_shapes, write_index, write_llama_folder, write_safetensors


@pytest.mark.parametrize("n_shards", [1, 3])
def test_a_folder_is_read_with_all_its_tensors(tmp_path: Path, n_shards: int) -> None:
    folder = write_llama_folder(tmp_path / "m", n_shards)
    (folder / "notes.bin").write_bytes(b"not looked at")
    source = read_folder(folder)
    assert {name: tensor.shape for name, tensor in source.tensors.items()} == llama_shapes()
    assert source.name == "m"
    assert source.architecture == "LlamaForCausalLM"
    assert source.code == ()
    assert "notes.bin" not in source.files


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    made = write_llama_folder(tmp_path / "made")
    repository = tmp_path / "models--owner--Tiny-Llama"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in made.iterdir():
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    source = read_folder(snapshot)
    assert source.name == "Tiny-Llama"
    assert len(source.tensors) == len(llama_shapes())


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "chat_template.jinja", "helper.py"])
def test_a_link_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_llama_folder(tmp_path / "m")
    outside = tmp_path / "outside"
    outside.write_bytes((folder / "model.safetensors").read_bytes())
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(UsageError, match="leads out of its folder"):
        read_folder(folder)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "sub/../model.safetensors", "..", "a\\..\\b.safetensors", "x.bin", ""],
)
def test_an_index_that_names_what_is_no_file_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_llama_folder(tmp_path / "m")
    write_index(folder, dict.fromkeys(llama_shapes(), name))
    with pytest.raises(UsageError, match="no safetensors file of its folder"):
        read_folder(folder)


def test_an_index_and_shards_that_differ_are_refused(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "m", 2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.9.extra"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"'model\.layers\.9\.extra', the shards have not"):
        read_folder(folder)


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard_is_named(tmp_path: Path, with_index: bool) -> None:
    folder = write_llama_folder(tmp_path / "m", 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    if not with_index:
        (folder / INDEX).unlink()
    with pytest.raises(NotFoundError, match=r"00002-of-00003.* does not exist|2 of 3 shards"):
        read_folder(folder)


def test_pickles_are_refused_and_never_read(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    canary = tmp_path / "canary"
    # A pickle that would make the canary: GLOBAL os.system, its argument, REDUCE.
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + os.fsencode(canary) + b"'\ntR.")
    assert is_model_folder(folder)
    with pytest.raises(UsageError, match=r"pickled \(pytorch_model\.bin\)"):
        read_folder(folder)
    assert not canary.exists()


@pytest.mark.parametrize("left", [0, 7, 8, 40, -1])
def test_a_truncated_shard_is_named(tmp_path: Path, left: int) -> None:
    folder = write_llama_folder(tmp_path / "m", 2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:left])
    with pytest.raises(DynrunError, match=r"00002-of-00002\.safetensors is not a whole safetensors file"):
        read_folder(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F16", "shape": [4], "data_offsets": [0, 9]},
        {"dtype": "F16", "shape": [4], "data_offsets": [8, 0]},
        {"dtype": "F16", "shape": [1 << 61], "data_offsets": [0, 8]},
        {"dtype": "F16", "shape": [-4], "data_offsets": [0, 8]},
        {"dtype": "F16", "shape": [2] * 9, "data_offsets": [0, 8]},
        {"dtype": "F16", "shape": [4], "data_offsets": [0, 8, 16]},
        {"dtype": 16, "shape": [4], "data_offsets": [0, 8]},
        {"dtype": "F16", "shape": "4", "data_offsets": [0, 8]},
        {"dtype": "F16", "shape": [True], "data_offsets": [0, 2]},
        ["no", "object"],
        None,
    ],
)
def test_an_impossible_tensor_is_refused(tmp_path: Path, entry: Any) -> None:
    folder = write_llama_folder(tmp_path / "m")
    text = json.dumps({"t": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(DynrunError, match="is not a whole safetensors file"):
        read_folder(folder)


@pytest.mark.parametrize(
    "header", [b"[]", b"{", b'{"a": 1, "a": 2}', b"\xff\xfe", b"[" * 20_000, b"1" * 5_000], ids=range(6)
)
def test_a_header_that_is_no_header_is_refused(tmp_path: Path, header: bytes) -> None:
    folder = write_llama_folder(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(DynrunError, match="is not a whole safetensors file"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("vocab_size", 10**12),
        ("hidden_size", -1),
        ("intermediate_size", [128, 10**15]),
        ("num_attention_heads", True),
        ("num_experts", "many"),
        ("hidden_size", float("inf")),
    ],
)
def test_sizes_that_the_weights_do_not_bear_out_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"says {key} = .*, which its weights do not bear out"):
        read_folder(write_llama_folder(tmp_path / "m", **{key: value}))
    nested = write_llama_folder(tmp_path / "n", text_config={key: value})
    with pytest.raises(UsageError, match=f"says {key} = "):
        read_folder(nested)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, ""])
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    folder = write_llama_folder(tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config\.json (is|holds) no JSON"):
        read_folder(folder)


def test_two_shards_with_one_tensor_are_refused(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    write_safetensors(folder / "model-00002-of-00002.safetensors", {"model.norm.weight": (64,)})
    with pytest.raises(UsageError, match=r"'model\.norm\.weight', which a shard before it has"):
        read_folder(folder)


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_of_the_models_own_is_refused_unless_it_was_said_what_to_do(tmp_path: Path, where: str) -> None:
    folder = write_llama_folder(tmp_path / "m")
    said = json.loads((folder / where).read_text()) if (folder / where).exists() else {}
    (folder / where).write_text(json.dumps({**said, "auto_map": {"AutoConfig": "evil.EvilConfig"}}))
    source = read_folder(folder)
    with pytest.raises(
        UsageError, match=rf"{where} names code of the model's own \(evil\.EvilConfig\); nothing was run"
    ):
        check_code(source, Wishes())
    check_code(source, Wishes(trust_code=True))
    check_code(source, Wishes(trust_code=False))
    assert known_conversion(source, Wishes(True)).key != known_conversion(source, Wishes(False)).key


def test_of_a_repository_only_what_a_conversion_reads_is_wanted() -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX, "config.json"]
    names += ["tokenizer.json", "tokenizer.model", "README.md", "chat_template.jinja", "merges.txt"]
    others = ["consolidated.safetensors", "pytorch_model.bin", "modeling.py", "original/model.safetensors", "a.gguf"]
    assert wanted_of([*names, *others]) == names


@pytest.mark.parametrize(("dtype", "wanted"), [("F16", "f16"), ("BF16", "bf16"), ("F32", "f32"), ("F8_E4M3", "bf16")])
def test_the_result_has_the_precision_of_the_source(tmp_path: Path, dtype: str, wanted: str) -> None:
    source = read_folder(write_llama_folder(tmp_path / "m", dtype=dtype))
    assert out_type_of(weights_of(source)) == wanted
    plan = plan_conversion(source)
    n = sum(tensor.n_elements for tensor in source.tensors.values())
    assert plan.result_bytes > n * (4 if wanted == "f32" else 2)


def test_what_make_writes_afterwards_is_counted(tmp_path: Path) -> None:
    source = read_folder(write_llama_folder(tmp_path / "m"))
    # Of each of two layers: the inputs of q, k and v; of o; of gate and up (64 wide each); of down (128 wide).
    covariances = 2 * 2 * (3 * 64**2 + 128**2)
    reference = plan_conversion(source).result_bytes
    assert following_bytes(source, 2) == covariances + 3 * reference


def test_too_small_a_disk_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from dynrun.convert.stage import convert

    folder = write_llama_folder(tmp_path / "m")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DoesNotFitError, match="free some space, or set DYNRUN_CACHE"):
        convert(folder, Wishes(), lambda _: None)
