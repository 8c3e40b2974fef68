"""Handing files to Ollama and LM Studio: what is written where."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dynrun.cli.app import main
from dynrun.errors import DynrunError, UsageError
from dynrun.publish.export import export_lmstudio, export_ollama, lmstudio_models, modelfile_of
from tests.tiny import write_tiny_llama


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "Tiny-Q4_K_M.gguf", n_block=1)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_a_modelfile_names_the_file_and_what_its_maker_recommends(model: Path) -> None:
    metadata = {"general.sampling.temp": 0.6, "general.sampling.top_k": 20, "general.sampling.top_p": "much"}
    text = modelfile_of([model], metadata)
    assert text == f"FROM {model}\nPARAMETER temperature 0.6\nPARAMETER top_k 20\n"


def test_all_shards_are_named_by_one_pattern(tmp_path: Path) -> None:
    shards = [tmp_path / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert modelfile_of(shards, {}) == f"FROM {tmp_path}/m-*-of-00003.gguf\n"


def test_without_ollama_the_command_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert main(["export", "ollama", str(model), "--out", str(tmp_path / "out"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    modelfile = tmp_path / "out" / "Modelfile"
    assert data["files"] == [str(modelfile)]
    assert data["command"] == f"ollama create tiny-q4_k_m -f {modelfile}"
    assert data["done"] is False
    assert modelfile.read_text().startswith(f"FROM {model}\n")


def test_ollama_is_asked_to_take_it_and_its_refusal_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a program of that name: Ollama itself is not to be had here."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "ollama"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nopen({str(tmp_path / 'argv')!r}, 'w').write(repr(sys.argv[1:]))\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    done = export_ollama(model, "tiny", tmp_path / "out")
    assert done.done
    assert done.command == "ollama run tiny"
    assert (tmp_path / "argv").read_text() == repr(["create", "tiny", "-f", str(tmp_path / "out" / "Modelfile")])
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('Error: could not connect to ollama server')\n")
    with pytest.raises(DynrunError, match=r"could not connect to ollama server.*ollama serve"):
        export_ollama(model, "tiny", tmp_path / "out")


def test_lm_studio_finds_the_file_under_publisher_and_model(model: Path, home: Path) -> None:
    with pytest.raises(DynrunError, match="LM Studio has no folder"):
        lmstudio_models()
    (home / ".lmstudio").mkdir()
    projector = model.with_name("mmproj-Tiny-F16.gguf")
    projector.write_bytes(model.read_bytes())
    done = export_lmstudio(model, "me", "Tiny")
    folder = home / ".lmstudio" / "models" / "me" / "Tiny"
    assert set(done.files) == {folder / model.name, folder / projector.name}
    assert (folder / model.name).read_bytes() == model.read_bytes()
    assert (folder / model.name).samefile(model)


def test_lm_studios_own_settings_count(home: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    (home / ".lmstudio-home-pointer").write_text(f"{other}\n")
    assert lmstudio_models() == other / "models"
    (other / "settings.json").write_text(json.dumps({"downloadsFolder": str(tmp_path / "big disk")}))
    assert lmstudio_models() == tmp_path / "big disk"
    (other / "settings.json").write_text("{")
    assert lmstudio_models() == other / "models"


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "a..b"])
def test_names_that_lead_elsewhere_are_refused(model: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is no name for a model there"):
        export_lmstudio(model, "me", name, tmp_path / "models")
    with pytest.raises(UsageError, match="is no name for a model there"):
        export_ollama(model, name, tmp_path / "out", run=False)
    assert not (tmp_path / "models").exists()
