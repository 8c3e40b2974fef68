"""Calibration from the command line: mixtures, templates, imported imatrices, statistics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynrun.llamacpp import tools
from tests.commands import dynrun
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.e2e
SMALL = ("--tokens", "1024", "--n-ctx", "64")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf")


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "moe.gguf", n_expert=8)


def records(path: Path, n: int, *, bad: int = 0) -> Path:
    talks = [(f"{i} " * 30, f"x{i * 7} " * 30) for i in range(n)]
    roles = ("user", "assistant")
    lines = [
        json.dumps({"messages": [{"role": r, "content": c} for r, c in zip(roles, talk, strict=True)]})
        for talk in talks
    ]
    path.write_text("\n".join([*lines, *["{broken"] * bad]))
    return path


def test_a_mixture_is_calibrated_on_and_named_without_its_folders(tiny: Path, tmp_path: Path) -> None:
    own = records(tmp_path / "own.jsonl", 60, bad=1)
    made = dynrun("imatrix", tiny, *SMALL, "--calibration", f"builtin:1,{own}:2", "--json")
    assert made.exit_code == 0, made.stderr
    assert made.json["dataset"] == "builtin:1,own.jsonl:2"
    assert made.json["tokens"] == pytest.approx(1024, abs=16)
    assert "1 of 61 records" in made.stderr
    assert "the first: own.jsonl:61: not JSON" in made.stderr


def test_too_many_malformed_records_stop_the_run_in_one_line(tiny: Path, tmp_path: Path) -> None:
    own = records(tmp_path / "own.jsonl", 30, bad=4)
    made = dynrun("imatrix", tiny, *SMALL, "--calibration", own)
    assert made.exit_code == 2
    assert "own.jsonl:31" in made.error


@pytest.mark.parametrize(
    ("mixture", "code", "says"),
    [
        ("builtim", 2, "did you mean builtin?"),
        ("builtin:0", 2, "weight"),
        ("nowhere.jsonl", 4, "does not exist"),
        ("builtin,builtin:2", 2, "twice"),
    ],
)
def test_a_wrong_mixture_is_one_line(tiny: Path, mixture: str, code: int, says: str) -> None:
    made = dynrun("imatrix", tiny, *SMALL, "--calibration", mixture)
    assert made.exit_code == code
    assert says in made.error


def test_the_models_own_answers_calibrate_it(tiny: Path) -> None:
    made = dynrun("imatrix", tiny, "--tokens", "512", "--n-ctx", "64", "--calibration", "self", "--json")
    assert made.exit_code == 0, made.stderr
    assert made.json["dataset"] == "self"
    again = dynrun("imatrix", tiny, "--tokens", "512", "--n-ctx", "64", "--calibration", "self", "--json")
    assert again.json["cached"] is True
    assert again.json["sha256"] == made.json["sha256"]


def test_another_template_makes_another_text(tiny: Path, tmp_path: Path) -> None:
    template = tmp_path / "other.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    own, other = (dynrun("imatrix", tiny, *SMALL, *extra, "--json") for extra in ((), ("--chat-template", template)))
    assert own.json["sha256"] != other.json["sha256"]
    assert other.json["template"] == f"--chat-template {template}"
    shown = dynrun("show", tiny, "--template", "--chat-template", template)
    assert "[user] What is the weather like in Bergen?" in shown.stdout


def test_show_says_which_template_is_in_force(tiny: Path, tmp_path: Path) -> None:
    shown = dynrun("show", tiny, "--template", "--json").json
    assert shown["architecture"] == "llama"
    assert shown["template"]["origin"] == "tokenizer.chat_template of tiny.gguf"
    assert "<|im_start|>user\nWhat is the weather like in Bergen?<|im_end|>" in shown["template"]["example"]
    plain = write_tiny_llama(tmp_path / "plain.gguf", chat_template=None)
    assert dynrun("show", plain, "--json").json["template"]["origin"] == "none: plain text"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    ],
)
def test_a_hostile_template_ends_in_one_line(tmp_path: Path, source: str) -> None:
    model = write_tiny_llama(tmp_path / "hostile.gguf", chat_template=source)
    made = dynrun("imatrix", model, *SMALL)
    assert made.exit_code == 1
    assert "chat template (tokenizer.chat_template of hostile.gguf) fails" in made.error


def test_an_imatrix_of_llama_imatrix_is_imported_checked_and_merged(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(i) for i in range(900)))
    theirs = tmp_path / "theirs.gguf"
    tools.collect_imatrix(tiny, text, theirs, n_ctx=64, n_threads=2, parse_special=False, process_output=False)
    one = dynrun("imatrix", tiny, "--imatrix", theirs, "--out", tmp_path / "one.gguf", "--json")
    assert one.exit_code == 0, one.stderr
    assert one.json["missing"] == ["output.weight"]
    both = dynrun(
        "imatrix", tiny, "--imatrix", theirs, "--imatrix", tmp_path / "one.gguf", "--stats", "--json", cwd=tmp_path
    )
    assert both.json["tokens"] == 2 * one.json["tokens"]
    assert Path(tmp_path / both.json["plot"]).read_bytes().startswith(b"\x89PNG")
    other = dynrun("imatrix", write_tiny_llama(tmp_path / "wide.gguf", n_embd=512), "--imatrix", theirs)
    assert other.exit_code == 2
    assert "made for another model" in other.error
    sized = dynrun(
        "allocate",
        tiny,
        "--bpw",
        "6",
        "--imatrix",
        theirs,
        "--probe-tokens",
        "128",
        "--out",
        tmp_path / "s.toml",
        "--json",
    )
    assert sized.exit_code == 0, sized.stderr


def test_statistics_and_coverage_are_printed_and_drawn(moe: Path, tmp_path: Path) -> None:
    shown = dynrun("imatrix", moe, *SMALL, "--stats", "--plot", tmp_path / "drawn.png")
    assert shown.exit_code == 0, shown.stderr
    assert "Σ(Act²)" in shown.stdout
    assert "blk.1.ffn_down_exps.weight" in shown.stdout
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    data = dynrun("imatrix", moe, *SMALL, "--stats", "--json", cwd=tmp_path).json
    assert [len(group["tokens"]) for group in data["coverage"]] == [8, 8]
    assert sum(data["coverage"][0]["tokens"]) == 2 * data["tokens"]


def test_a_covariance_is_collected_when_asked(tiny: Path) -> None:
    made = dynrun("imatrix", tiny, *SMALL, "--covariance", "--json")
    assert made.exit_code == 0, made.stderr
    assert made.json["covariance"]["passes"] == 1
    folder = Path(made.json["covariance"]["path"])
    assert {kind: len(list(folder.glob(f"*.{kind}.npy"))) for kind in ("sums", "counts", "held")} == {
        "sums": 9,
        "counts": 9,
        "held": 9,
    }
    refused = dynrun("imatrix", tiny, *SMALL, "--covariance", "--memory", "100K", "--tokens", "900")
    assert refused.exit_code == 5
    assert "--memory" in refused.error


def test_rare_experts_are_reported(moe: Path) -> None:
    made = dynrun("imatrix", moe, *SMALL, "--min-expert-tokens", "100000", "--max-tokens", "2048", "--json")
    assert made.json["tokens"] == pytest.approx(2048, abs=32)
    assert made.json["short_experts"] == made.json["experts"] == 16
    assert "topped up with their layer's mean" in made.stderr
