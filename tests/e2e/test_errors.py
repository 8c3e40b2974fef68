"""Bad input: one clear line, the right exit code, nothing half-written."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.commands import dynrun
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.e2e
SMALL = ("--tokens", "512", "--ctx", "128", "--probe-tokens", "64")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf", n_vocab=512)


@pytest.fixture
def scheme(tiny: Path, tmp_path: Path) -> Path:
    path = tmp_path / "scheme.toml"
    assert dynrun("allocate", tiny, "--quant", "Q4_K_M", *SMALL, "--out", path).exit_code == 0
    return path


def test_a_missing_file(tmp_path: Path) -> None:
    ran = dynrun("make", tmp_path / "none.gguf", "--quant", "Q4_K_M")
    assert ran.exit_code == 4
    assert "none.gguf does not exist" in ran.error


def test_an_unknown_name_says_the_nearest() -> None:
    ran = dynrun("make", "demo-mor", "--quant", "Q4_K_M")
    assert ran.exit_code == 4
    assert "did you mean demo-moe?" in ran.error


def test_a_truncated_gguf(tiny: Path) -> None:
    tiny.write_bytes(tiny.read_bytes()[:-1000])
    ran = dynrun("make", tiny, "--quant", "Q4_K_M", *SMALL)
    assert ran.exit_code == 1
    assert "not a whole GGUF: it is truncated" in ran.error


def test_a_scheme_for_another_architecture(tiny: Path, scheme: Path) -> None:
    scheme.write_text(scheme.read_text().replace('architecture = "llama"', 'architecture = "qwen2"'))
    ran = dynrun("quantize", tiny, scheme, *SMALL[:4])
    assert ran.exit_code == 2
    assert "qwen2" in ran.error
    assert "llama" in ran.error


def test_a_scheme_with_a_misspelt_tensor(tiny: Path, scheme: Path) -> None:
    scheme.write_text(scheme.read_text().replace("attn_q.weight", "atn_q.weight"))
    ran = dynrun("quantize", tiny, scheme, *SMALL[:4])
    assert ran.exit_code == 2
    assert "atn_q" in ran.error
    assert "attn_q" in ran.error


def test_a_budget_too_small_says_the_smallest_possible(tiny: Path) -> None:
    ran = dynrun("make", tiny, "--size", "10K", *SMALL)
    assert ran.exit_code == 5
    assert "the smallest possible is" in ran.error


def test_the_smallest_possible_is_possible(tiny: Path, tmp_path: Path) -> None:
    smallest = dynrun("make", tiny, "--size", "10K", *SMALL).error.split("smallest possible is ")[1].split(" bytes")[0]
    ran = dynrun("allocate", tiny, "--size", smallest.replace(",", ""), *SMALL, "--out", tmp_path / "s.toml", "--json")
    assert ran.exit_code == 0, ran.stderr
    assert ran.json["size_bytes"] <= int(smallest.replace(",", ""))


def test_a_budget_larger_than_the_reference(tiny: Path) -> None:
    ran = dynrun("make", tiny, "--size", "1G", *SMALL)
    assert ran.exit_code == 5
    assert "larger than tiny.gguf itself" in ran.error


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "say how large"),
        (("--quant", "Q4_K_M", "--bpw", "4"), "say how large"),
        (("--quant", "Q4_K_X"), "no quant 'Q4_K_X'"),
        (("--size", "much"), "'much' is no size"),
        (("--bpw", "-1"), "make no file"),
    ],
)
def test_sizes_that_make_no_sense(tiny: Path, options: tuple[str, ...], reason: str) -> None:
    ran = dynrun("make", tiny, *options, *SMALL)
    assert ran.exit_code == 2
    assert reason in ran.error


def test_a_model_without_a_chat_template_is_calibrated_on_plain_text_and_that_is_said(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "plain.gguf", n_vocab=512, chat_template=None)
    ran = dynrun("imatrix", model, *SMALL[:4], "--json")
    assert ran.exit_code == 0, ran.stderr
    assert ran.json["template"] == "none: plain text"
    assert "no chat template: plain text was used" in ran.stderr


def test_an_unknown_option_is_a_usage_error() -> None:
    assert dynrun("make", "demo", "--quantum", "Q4_K_M").exit_code == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 6 MB; mounting needs root."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6M", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(tiny: Path, small_disk: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    ran = dynrun(
        *("make", tiny, "--quant", "Q8_0", *SMALL, "--eval-tokens", "20000", "--out", out),
        env={"DYNRUN_CACHE": str(small_disk)},
    )
    assert ran.exit_code == 5, ran.stderr
    assert not out.exists()
    again = dynrun("make", tiny, "--quant", "Q8_0", *SMALL, "--eval-tokens", "256", "--out", out)
    assert again.exit_code == 0, again.stderr
