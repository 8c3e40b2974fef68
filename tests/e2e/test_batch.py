"""Several quants with one command, from a folder of files to a folder that can be published."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynrun.gguf.header import read_header
from tests.commands import dynrun
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.e2e
SMALL = ("--tokens", "512", "--ctx", "128", "--probe-tokens", "64", "--eval-tokens", "256", "--candidates", "0")
SMALL = (*SMALL, "--no-feedback")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf", n_block=1, n_vocab=512)


def test_a_batch_shares_what_is_measured_and_ends_in_one_folder(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "quants"
    ran = dynrun("make", tiny, "--quant", "Q4_K_M,Q2_K", *SMALL, "--out", out, "--json")
    assert ran.exit_code == 0, ran.stderr
    first, second = ran.json["made"]
    assert [Path(one["file"]) for one in (first, second)] == [out / "tiny-Q4_K_M.gguf", out / "tiny-Q2_K.gguf"]
    assert first["size_bytes"] > second["size_bytes"]
    cached = {stage["name"]: stage["cached"] for stage in second["stages"]}
    assert cached["imatrix"]
    assert cached["sensitivity"]
    assert not cached["quantize"]
    assert Path(ran.json["imatrix"]) == out / "tiny-imatrix.gguf"
    assert read_header(out / "tiny-imatrix.gguf").metadata["general.type"] == "imatrix"
    card = (out / "README.md").read_text(encoding="utf-8").replace("\\", "")
    assert "tiny-Q4_K_M.gguf" in card
    assert "tiny-Q2_K.gguf" in card


def test_one_impossible_quant_stops_the_batch_before_the_probes(tiny: Path) -> None:
    twice = dynrun("make", tiny, "--quant", "Q2_K,Q2_K", *SMALL)
    assert twice.exit_code == 2
    assert "Q2_K is asked for twice" in twice.error
    unknown = dynrun("make", tiny, "--quant", "Q4_K_M,Q9_K", *SMALL)
    assert unknown.exit_code == 2
    assert "no quant 'Q9_K'" in unknown.error
    assert "sensitivity:" not in unknown.stderr


def test_what_makes_no_batch_is_said(tiny: Path, tmp_path: Path) -> None:
    assert "has an empty name" in dynrun("make", tiny, "--quant", "Q2_K,").error
    assert "several quants go with none of" in dynrun("make", tiny, "--quant", "Q2_K,Q4_K_M", "--bpw", "4").error
    ran = dynrun("make", tiny, "--quant", "Q2_K,Q4_K_M", "--out", tmp_path / "one.gguf")
    assert "is no folder" in ran.error
