"""`dynrun compare` from files to ratios, with stock files that it builds and with given ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynrun.cli.app import main
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.process import capture
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
EVALUATED = ("--eval-tokens", "600")
CALIBRATED = ("--tokens", "256", "--n-ctx", "128")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny-F16.gguf")


def _quantized(source: Path, label: str) -> Path:
    out = source.with_name(f"tiny-{label}.gguf")
    if not out.is_file():
        capture([installation().program("llama-quantize"), source, out, label, "1"])
    return out


def _compare(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    assert main(["compare", *map(str, arguments), *EVALUATED, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_files_are_compared_with_stock_presets_of_one_imatrix(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYNRUN_THREADS", "1")
    theirs = _quantized(tiny, "Q4_0")
    options = (*CALIBRATED, "--presets", "Q3_K_M,Q4_K_M,Q8_0")
    found = _compare(capsys, tiny, theirs, *options)
    assert [point["label"] for point in found["curve"]] == ["Q3_K_M", "Q4_K_M", "Q8_0"]
    assert {point["imatrix"] for point in found["curve"]} == {"same"}
    (row,) = found["rows"]
    assert row["imatrix"] == "unknown"
    assert row["extrapolated"] is False
    (x0, y0), (x1, y1) = [(p["size_bytes"], np.log(p["kld"]["mean"])) for p in found["curve"][:2]]
    assert x0 < row["size_bytes"] < x1
    curve_kld = np.exp(y0 + (row["size_bytes"] - x0) / (x1 - x0) * (y1 - y0))
    assert row["curve_kld"] == pytest.approx(curve_kld)
    assert row["equal_size_ratio"] == pytest.approx(row["kld"]["mean"] / curve_kld)
    assert row["equal_size_ci95"][0] < row["equal_size_ratio"] < row["equal_size_ci95"][1]
    # A stock file of this cache is its own opponent, under any name that leads to it.
    stock = found["curve"][1]
    again = _compare(capsys, tiny, stock["file"], *options)["rows"][0]
    assert again["equal_size_ratio"] == pytest.approx(1)
    assert again["imatrix"] == "same"


def test_a_given_curve_is_taken_as_it_is_and_ends_are_marked(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curve = [_quantized(tiny, label) for label in ("Q4_K_M", "Q5_K_M")]
    given = [argument for path in (*curve, curve[0]) for argument in ("--curve", path)]
    larger = _quantized(tiny, "Q8_0")
    found = _compare(capsys, tiny, larger, curve[0], *given)
    assert [point["label"] for point in found["curve"]] == ["Q4_K_M", "Q5_K_M"]
    assert [row["extrapolated"] for row in found["rows"]] == [True, False]
    assert found["rows"][1]["equal_size_ratio"] == pytest.approx(1)
    assert {row["imatrix"] for row in found["rows"]} == {"unknown"}
    assert main(["compare", str(tiny), str(larger), *map(str, given), *EVALUATED]) == 0
    out = capsys.readouterr().out
    assert "* extrapolated: the file is smaller or larger than every stock file of the curve" in out
    assert "imatrix unknown or other" in out


def test_a_file_of_another_model_is_refused_before_the_imatrix_is_collected(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_tiny_llama(tmp_path / "other.gguf", n_vocab=352)
    assert main(["compare", str(tiny), str(other), *EVALUATED]) == 2
    said = capsys.readouterr().err
    assert "imatrix:" not in said
    assert said.splitlines()[-1].startswith(f"dynrun: {other} has another vocabulary than the reference {tiny}")


def test_an_unknown_preset_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = _quantized(tiny, "Q8_0")
    assert main(["compare", str(tiny), str(copy), *CALIBRATED, "--presets", "Q9_K,Q8_0", *EVALUATED]) == 2
    assert "llama.cpp has no preset 'Q9_K'" in capsys.readouterr().err


def test_shards_are_measured_as_one_file(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = _quantized(tiny, "Q8_0")
    shutil.copy(whole, tmp_path / "whole.gguf")
    split = installation().program("llama-gguf-split")
    capture([split, "--split", "--split-max-size", "1M", tmp_path / "whole.gguf", tmp_path / "shards"])
    first = min(tmp_path.glob("shards-00001-of-*.gguf"))
    assert main(["eval", "kld", str(tiny), str(whole), str(first), "--tokens", "200", "--ctx", "64", "--json"]) == 0
    one, shards = json.loads(capsys.readouterr().out)["rows"]
    assert shards["kld"] == one["kld"]
    assert shards["bpw"] == pytest.approx(one["bpw"], rel=0.01)
    assert shards["size_bytes"] == sum(path.stat().st_size for path in tmp_path.glob("shards-*.gguf"))
