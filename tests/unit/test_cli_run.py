"""`run`, `ls` and `doctor` where no model is loaded."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynrun.cli.app import main
from dynrun.llamacpp.build import installation
from tests.tiny import write_tiny_llama


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


Stdin = Callable[[str | None], None]


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Stdin:
    """Sets standard input: text that is piped, or None for a terminal."""

    def put(text: str | None) -> None:
        monkeypatch.setattr(sys, "stdin", Terminal() if text is None else io.StringIO(text))

    return put


@pytest.fixture
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    installation.cache_clear()
    yield
    installation.cache_clear()


@pytest.mark.parametrize("option", [["--json"], ["--image", "a.png"]])
def test_run_that_cannot_be_a_chat_says_how_to_give_a_prompt(
    stdin: Stdin, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    stdin(None)
    assert main(["run", "demo", *option]) == 2
    assert '-p "…", or pipe text' in capsys.readouterr().err


def test_run_with_nothing_but_blank_text_is_refused(stdin: Stdin, capsys: pytest.CaptureFixture[str]) -> None:
    stdin("\n \n")
    assert main(["run", "demo", "-p", " "]) == 2
    assert "no prompt" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["-p", "\udcff"], ["-p", "x", "--system", "\udcff"]])
def test_run_refuses_text_that_is_no_utf8(
    stdin: Stdin, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    stdin(None)
    assert main(["run", "demo", *arguments]) == 2
    assert "UTF-8" in capsys.readouterr().err


def test_run_refuses_piped_bytes_that_are_no_utf8(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert main(["run", "demo"]) == 2
    assert "standard input is no UTF-8" in capsys.readouterr().err


def test_run_refuses_an_infinite_temperature(stdin: Stdin, capsys: pytest.CaptureFixture[str]) -> None:
    stdin(None)
    assert main(["run", "demo", "-p", "x", "--temperature", "inf"]) == 2
    assert "temperature" in capsys.readouterr().err


def test_run_without_a_model_or_a_conversation_asks_which(stdin: Stdin, capsys: pytest.CaptureFixture[str]) -> None:
    stdin(None)
    assert main(["run", "-p", "x"]) == 2
    assert "which model?" in capsys.readouterr().err
    assert main(["run", "--resume", "last", "-p", "x"]) == 4
    assert "--chats" in capsys.readouterr().err


def test_no_conversations_are_listed_where_none_was_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--chats"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["run", "--chats", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"chats": []}


def test_an_image_needs_an_encoder_and_must_be_one(
    stdin: Stdin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin(None)
    path, image = write_tiny_llama(tmp_path / "tiny.gguf"), tmp_path / "a.png"
    assert main(["run", str(path), "-p", "x", "--image", str(image)]) == 2
    assert "no image encoder lies beside tiny.gguf" in capsys.readouterr().err
    write_tiny_llama(tmp_path / "mmproj-F16.gguf")
    assert main(["run", str(path), "-p", "x", "--image", str(image)]) == 4
    assert "a.png" in capsys.readouterr().err


def test_serving_another_machine_needs_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    assert main(["serve", str(path), "--host", "0.0.0.0"]) == 2  # noqa: S104
    assert "--api-key-file" in capsys.readouterr().err
    assert main(["serve", str(path), "--host", "0.0.0.0", "--api-key-file", str(tmp_path / "none")]) == 4  # noqa: S104
    assert "cannot be read" in capsys.readouterr().err


def test_a_model_is_served_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    assert main(["serve", str(path), str(path)]) == 2
    assert "named twice" in capsys.readouterr().err
    other = write_tiny_llama(tmp_path / "other.gguf")
    assert main(["serve", str(path), str(other), "--mmproj", str(other)]) == 2
    assert "of one model" in capsys.readouterr().err


def test_run_of_a_missing_file_ends_with_exit_code_4(stdin: Stdin, capsys: pytest.CaptureFixture[str]) -> None:
    stdin(None)
    assert main(["run", "./nowhere.gguf", "-p", "x"]) == 4
    assert "./nowhere.gguf does not exist" in capsys.readouterr().err


def test_run_of_a_truncated_file_is_one_clear_line(
    stdin: Stdin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin(None)
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:1_000_000])
    assert main(["run", str(path), "-p", "x"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "truncated" in lines[0]


def test_run_before_the_build_says_to_build(
    nothing_built: None, stdin: Stdin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin(None)
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    assert main(["run", str(path), "-p", "x"]) == 1
    assert "python3 build.py" in capsys.readouterr().err


def test_ls_without_models_says_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    assert 'dynrun run demo -p "Hello"' in capsys.readouterr().err
    assert main(["ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"models": []}


def test_ls_lists_what_make_made(private_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = private_cache / "models" / "made"
    made.mkdir(parents=True)
    path = write_tiny_llama(made / "demo-Q3_K_M.gguf")
    (made / "demo-broken.gguf").write_bytes(b"no model")
    assert main(["ls", "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert {**model, "quant": ""} == {
        "name": "demo:Q3_K_M",
        "path": str(path),
        "size_bytes": path.stat().st_size,
        "architecture": "llama",
        "quant": "",
    }
    assert main(["ls"]) == 0
    assert capsys.readouterr().out.split("\t")[0] == "demo:Q3_K_M"


def test_doctor_works_where_nothing_is_built(nothing_built: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in report["checks"]}
    assert not report["ok"]
    assert report["llama_cpp"] == {"commit": None, "backend": None}
    for name in ("llama.cpp", "programs", "devices"):
        assert not checks[name]["ok"]
        assert "build.py" in checks[name]["fix"]
    assert [device["name"] for device in report["devices"]] == ["CPU"]
    assert report["devices"][0]["cores"] >= 1
