"""Several quants with one command, from a folder of files to a folder that can be published."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynrun.gguf.header import read_header
from tests.commands import dynrun
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.e2e
SMALL = ("--tokens", "512", "--ctx", "128", "--probe-tokens", "64", "--eval-tokens", "256", "--candidates", "0")
PLAIN = (*SMALL, "--no-feedback")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf", n_block=1, n_vocab=512)


def test_a_batch_shares_what_is_measured_and_ends_in_one_folder(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "quants"
    ran = dynrun("make", tiny, "--quant", "Q4_K_M,Q2_K", *PLAIN, "--out", out, "--json")
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


def test_feedbacks_statistics_are_shared_and_each_file_is_in_shards(tmp_path: Path) -> None:
    tiny, out = write_tiny_llama(tmp_path / "tiny.gguf", n_block=6, n_vocab=512), tmp_path / "quants"
    ran = dynrun("make", tiny, "--quant", "Q4_K_M,Q2_K", *SMALL, "--split-max-size", "1.1M", "--out", out, "--json")
    assert ran.exit_code == 0, ran.stderr
    first, second = ran.json["made"]
    assert first["elapsed_s"] + second["elapsed_s"] <= ran.json["elapsed_s"]
    assert {stage["name"] for stage in second["stages"] if stage["cached"]} >= {"covariance", "imatrix", "sensitivity"}
    for one, label in ((first, "Q4_K_M"), (second, "Q2_K")):
        files = [Path(name) for name in one["files"]]
        assert len(files) > 1
        assert files == sorted(out.glob(f"tiny-{label}-0000*.gguf"))
        assert all(path.stat().st_size <= 1_100_000 for path in files)
        assert read_header(files[0]).metadata["split.count"] == len(files)
    card = (out / "README.md").read_text(encoding="utf-8").replace("\\", "")
    assert "tiny-Q2_K-00001-of-0000" in card


def test_one_impossible_quant_stops_the_batch_before_the_probes(tiny: Path) -> None:
    twice = dynrun("make", tiny, "--quant", "Q2_K,Q2_K", *PLAIN)
    assert twice.exit_code == 2
    assert "Q2_K is asked for twice" in twice.error
    unknown = dynrun("make", tiny, "--quant", "Q4_K_M,Q9_K", *PLAIN)
    assert unknown.exit_code == 2
    assert "no quant 'Q9_K'" in unknown.error
    assert "sensitivity:" not in unknown.stderr


def test_what_makes_no_batch_is_said(tiny: Path, tmp_path: Path) -> None:
    assert "has an empty name" in dynrun("make", tiny, "--quant", "Q2_K,").error
    assert "several quants go with none of" in dynrun("make", tiny, "--quant", "Q2_K,Q4_K_M", "--bpw", "4").error
    ran = dynrun("make", tiny, "--quant", "Q2_K,Q4_K_M", "--out", tmp_path / "one.gguf")
    assert "is no folder" in ran.error
