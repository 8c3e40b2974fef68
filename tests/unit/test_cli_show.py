"""`dynrun show`: what a model is and what its template makes of a conversation, out of the header alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynrun.cli.app import main
from tests.tiny import CHAT_TEMPLATE, write_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", n_embd=64, n_ff=64, n_block=1)


def template(tmp_path: Path, source: str) -> str:
    path = tmp_path / "f.jinja"
    path.write_text(source, encoding="utf-8")
    return str(path)


def test_show_tells_what_a_model_is(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(model)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("tiny: llama, F16, ")
    assert "trained on 2048 tokens" in out
    assert "chat template: tokenizer.chat_template of tiny.gguf\n  {% for message in messages %}" in out


def test_show_gives_the_same_as_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(model), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {"name", "path", "size_bytes", "architecture", "quant", "template"} <= shown.keys()
    assert shown["size_bytes"] == model.stat().st_size
    assert shown["template"]["origin"] == "tokenizer.chat_template of tiny.gguf"
    assert shown["template"]["source"] == CHAT_TEMPLATE
    assert "<|im_start|>user\nWhat is the weather like in Bergen?<|im_end|>\n" in shown["template"]["example"]


def test_show_template_prints_source_and_example(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(model), "--template"]) == 0
    out = capsys.readouterr().out
    assert f"--- template\n{CHAT_TEMPLATE}\n\n--- example\n<|im_start|>system\nAnswer in one sentence." in out


def test_the_example_calls_tools_where_the_template_knows_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (
        "{{ bos_token }}{{ tools|length }}{% for m in messages %}{% for c in m.tool_calls %}"
        "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}{{ eos_token }}"
    )
    assert main(["show", str(model), "--template", "--chat-template", template(tmp_path, source)]) == 0
    out = capsys.readouterr().out
    assert f"chat template: --chat-template {tmp_path / 'f.jinja'}" in out
    assert out.endswith('<|im_start|>1{"place": "Bergen"}<|im_end|>\n')


def test_a_template_that_fails_is_shown_with_what_it_fails_at(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(model), "--template", "--chat-template", template(tmp_path, "{% for %}\x1b[2J")]) == 0
    out = capsys.readouterr().out
    assert "--- template\n{% for %}\\x1b[2J\n" in out
    assert "is not valid Jinja" in out


def test_a_model_without_template_is_given_plain_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny_llama(tmp_path / "t.gguf", n_embd=64, n_ff=64, n_block=1, chat_template=None)
    assert main(["show", str(path), "--template"]) == 0
    out = capsys.readouterr().out
    assert "chat template: none: plain text" in out
    assert "--- template\n(none)\n" in out


@pytest.mark.parametrize("command", [["show"], ["run", "-p", "x"]])
def test_a_template_file_that_is_missing_ends_with_exit_code_4(
    model: Path, capsys: pytest.CaptureFixture[str], command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert main([*command, str(model), "--chat-template", str(tmp_path / "none.jinja")]) == 4
    assert "none.jinja does not exist" in capsys.readouterr().err


def test_an_empty_template_file_is_refused_before_the_server_would_ignore_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert main(["run", str(model), "-p", "x", "--chat-template", template(tmp_path, "\n")]) == 2
    assert "is empty" in capsys.readouterr().err
