"""`dynrun scheme`: what is printed, and what is given as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynrun.cli.app import main
from dynrun.gguf.header import read_header
from dynrun.gguf.quantizable import quantizable
from dynrun.scheme import Scheme, read_scheme, write_scheme
from tests.tiny import write_tiny_llama

N_LAYER = 84
KINDS = ("attn_q", "attn_output", "ffn_down_exps", "cross_attn_\x1b[2J")


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A scheme of more layers than a terminal has columns for; its last layer is F16, layer 40 has no attn_q."""
    types = {f"blk.{i}.{kind}.weight": "Q4_K" for i in range(N_LAYER) for kind in KINDS}
    types |= {f"blk.{i}.attn_q.weight": "IQ1_M" for i in range(10)} | {f"blk.{N_LAYER - 1}.attn_q.weight": "F16"}
    del types["blk.40.attn_q.weight"]
    path = tmp_path / "large.scheme.toml"
    write_scheme(Scheme({"output.weight": "Q6_K", **types}, "XL", "qwen9", predicted_kld=0.25), path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf", n_embd=64, n_ff=64, n_block=2)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["scheme", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    return json.loads(run(capsys, *arguments, "--json"))


def test_the_map_shows_each_layer_as_a_character_within_80_columns(
    large: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(capsys, "show", large)
    lines = out.splitlines()
    assert lines[0] == "XL, qwen9, predicted KLD 0.2500"
    assert "6 output: Q6_K" in lines
    assert max(map(len, lines)) <= 80
    rulers = [line.split() for line in lines if line.startswith("layer ")]
    assert [number for ruler in rulers for number in ruler[1:]] == [str(n) for n in range(0, N_LAYER, 10)]
    cells = "".join(line.split()[1] for line in lines if line.startswith("attn_q "))
    assert cells == "1" * 10 + "4" * 30 + "." + "4" * 42 + "F"
    # In the order of a block, what is unknown last; escape sequences do not reach the terminal.
    first = lines[lines.index(next(line for line in lines if line.startswith("layer "))) + 1 :][:4]
    assert [line.split()[0] for line in first] == ["attn_q", "attn_output", "ffn_down_exps", "cross_attn_\\x1b[2J"]
    assert "\x1b" not in out


def test_the_legend_explains_every_character(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    legend = [line.split() for line in run(capsys, "show", large).splitlines()[-5:]]
    assert legend == [
        ["type", "bits", "per", "weight", "tensors", "MB"],
        ["1", "IQ1_M", "1.75", "10", "?"],
        ["4", "Q4_K", "4.5", str(N_LAYER * 4 - 12), "?"],
        ["6", "Q6_K", "6.562", "1", "?"],
        ["F", "F16", "16", "1", "?"],
    ]


def test_a_terminal_with_colours_gets_them(
    large: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    out = run(capsys, "show", large)
    row = next(line for line in out.splitlines() if line.startswith("attn_q "))
    assert len({part.split("m")[0] for part in row.split("\x1b[")[1:]}) >= 3


def test_show_gives_the_same_as_json(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run_json(capsys, "show", large)
    assert shown["types"] == dict(read_scheme(large).types)
    assert (shown["label"], shown["predicted_kld"], shown["nbytes"]) == ("XL", 0.25, None)
    assert shown["shares"][0] == {"type": "IQ1_M", "n_tensors": 10, "n_weights": None, "nbytes": None}


def test_a_gguf_is_shown_with_its_sizes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "show", model)
    assert out.startswith("F16, llama, of tiny, 0.2 MB\nquantizable tensors: 16, 0.2 MB, 16.000 bits per weight\n")
    assert "others, never quantized: 5," in out
    assert "attn_q      FF\n" in out
    assert run_json(capsys, "show", model)["bpw"] == 16


def test_a_scheme_made_by_hand_is_checked_and_weighed_with_its_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "mine.toml"
    short.write_text('[scheme]\nformat = 1\n[types]\ndefault = "Q4_0"\n"blk.*.attn_q.weight" = "Q8_0"\n')
    out = run(capsys, "show", short)
    assert "default: Q4_0 (a rule; --model MODEL applies it)" in out
    shown = run_json(capsys, "show", short, "--model", model)
    assert shown["types"]["blk.1.attn_q.weight"] == "Q8_0"
    assert shown["rules"] == {}
    assert 4.5 < shown["bpw"] < 5
    short.write_text(short.read_text().replace("attn_q.", "attn_qq."))
    assert main(["scheme", "show", str(short), "--model", str(model)]) == 2
    assert "the nearest valid one is 'blk.*.attn_q.weight'" in capsys.readouterr().err


def test_diff_tells_what_differs_and_both_sizes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    types = dict.fromkeys(quantizable(read_header(model)), "F16") | {
        "blk.0.attn_q.weight": "Q8_0",
        "blk.9.attn_q.weight": "Q4_0",
    }
    other = tmp_path / "b.toml"
    write_scheme(Scheme(types, "mine", predicted_kld=0.125, measured_kld=0.13), other)
    lines = run(capsys, "diff", model, other).splitlines()
    assert lines[0].startswith("A: tiny.gguf: F16, llama, of tiny, 0.2 MB; tensors 0.2 MB, 16.000 bits per weight")
    assert lines[1] == "B: b.toml: mine, predicted KLD 0.1250, measured KLD 0.1300"
    assert lines[2] == "1 tensors differ, 15 are the same"
    assert lines[5].split() == ["attn_q", "F16", "Q8_0", "1", "0"]
    assert lines[-1] == "only in B: attn_q 9 Q4_0"
    found = run_json(capsys, "diff", model, other)
    assert found["types"] == {"blk.0.attn_q.weight": ["F16", "Q8_0"], "blk.9.attn_q.weight": [None, "Q4_0"]}
    assert found["only_b"] == ["blk.9.attn_q.weight"]
    assert (found["a"]["bpw"], found["b"]["predicted_kld"], found["n_same"]) == (16, 0.125, 15)


def test_from_prints_a_scheme_or_writes_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "from", model)
    out = tmp_path / "theirs.toml"
    assert run(capsys, "from", model, "--out", out) == f"{out}\n"
    assert out.read_text() == printed
    assert read_scheme(out, quantizable(read_header(model))).label == "F16"
    given = run_json(capsys, "from", model)
    assert given["path"] is None
    assert given["types"] == dict(read_scheme(out).types)


@pytest.mark.parametrize("command", [("show", "none.toml"), ("diff", "none.toml", "none.toml"), ("from", "none.gguf")])
def test_a_missing_file_is_one_line_and_exit_code_4(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scheme", *command]) == 4
    assert f"{command[1]} does not exist" in capsys.readouterr().err


def test_from_refuses_what_is_no_gguf(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scheme", "from", str(large)]) == 1
    assert "is not a whole GGUF" in capsys.readouterr().err
