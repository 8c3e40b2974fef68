"""References out of repositories: what is fetched, and what is taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dynrun.cli.convert import named_source, unconverted
from dynrun.convert.fetch import fetch_folder, missing_files, reference_source
from dynrun.convert.folder import read_folder
from dynrun.errors import NotFoundError
from tests.hub_server import Hub, serving_here, set_endpoint
from tests.safetensors_files import llama_shapes, write_llama_folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving_here(monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture
def repository(hub: Hub, tmp_path: Path) -> str:
    folder = write_llama_folder(tmp_path / "m", 2)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.models["o/Tiny"] = {**files, "modeling_tiny.py": b"raise SystemExit", "pytorch_model.bin": b"pickle"}
    hub.models["o/Tiny"]["onnx/model.safetensors"] = b"another form of it"
    return "o/Tiny"


def test_only_what_a_conversion_reads_comes_here(hub: Hub, repository: str) -> None:
    source = read_folder(fetch_folder(repository, lambda _: None))
    assert source.name == "Tiny"
    assert source.tensors.keys() == llama_shapes().keys()
    fetched = {line.split("/")[-1] for line in hub.requests if "/resolve/" in line}
    assert not fetched & {"modeling_tiny.py", "pytorch_model.bin"}
    assert not any("onnx" in line for line in hub.requests if "/resolve/" in line)


def test_a_gguf_of_full_precision_is_taken_in_their_place(hub: Hub, repository: str) -> None:
    hub.models[repository] |= {"Tiny-Q4_K_M.gguf": b"small", "Tiny-F16.gguf": b"whole", "Tiny-F32.gguf": b"larger"}
    said: list[str] = []
    source = reference_source(repository, said.append)
    assert source is not None
    assert source.name == "Tiny-F16.gguf"
    assert source.read_bytes() == b"whole"
    assert "has a F16 GGUF, which is taken" in said[0]


def test_what_is_no_repository_of_weights_is_left_to_others(hub: Hub, tmp_path: Path) -> None:
    hub.models["o/quants"] = {"x-Q4_K_M.gguf": b"small"}
    for model in ("o/quants", "o/quants:Q4_K_M", "demo", str(tmp_path), "./o/x", str(tmp_path / "o" / "x.gguf")):
        assert reference_source(model, lambda _: None) is None
    with pytest.raises(NotFoundError, match="o/quants has no safetensors"):
        fetch_folder("o/quants", lambda _: None)


def test_without_a_network_what_is_here_is_taken(hub: Hub, repository: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = reference_source(repository, lambda _: None)
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert reference_source(repository, lambda _: None) == here
    assert reference_source("o/other", lambda _: None) is None


def test_shards_of_full_precision_are_taken_whole_and_those_that_lack_one_are_not(hub: Hub, repository: str) -> None:
    shards = {f"BF16/Tiny-BF16-0000{i}-of-00002.gguf": bytes([i]) for i in (1, 2)}
    hub.models[repository] |= {**shards, "Tiny-F16-00001-of-00002.gguf": b"one of two"}
    source = reference_source(repository, lambda _: None)
    assert source is not None
    assert source.name == "Tiny-BF16-00001-of-00002.gguf"
    assert (source.parent / "Tiny-BF16-00002-of-00002.gguf").is_file()


def test_what_is_wished_of_a_conversion_is_not_evaded_by_a_gguf(hub: Hub, repository: str) -> None:
    hub.models[repository] |= {"Tiny-F16.gguf": b"whole"}
    taken = named_source(repository, wished=False)
    assert taken is not None
    assert taken.name == "Tiny-F16.gguf"
    wished = named_source(repository, wished=True)
    assert wished is not None
    assert (wished / "config.json").is_file()


def test_a_dry_run_fetches_and_converts_nothing(hub: Hub, repository: str, tmp_path: Path) -> None:
    (stage,) = unconverted(repository, None)
    assert stage.name == "fetch"
    assert "4 files of o/Tiny" in stage.detail
    assert not any("/resolve/" in line for line in hub.requests)
    folder = fetch_folder(repository, lambda _: None)
    assert missing_files(repository) == []
    (stage,) = unconverted(str(folder), None)
    assert stage.name == "convert"
    assert "to F16, " in stage.detail
    assert not list(tmp_path.rglob("*.gguf"))
