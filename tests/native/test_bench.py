"""`bench` with the real llama-bench on tiny models: rows, history, types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynrun.allocation.speed import read_speed_table
from dynrun.cli.app import main
from dynrun.gguf.header import read_header
from dynrun.runtime.bench_history import history_file
from dynrun.runtime.calibration import calibration_of
from dynrun.runtime.this_machine import this_machine
from dynrun.runtime.type_speed import Shape, measure_types, write_model, write_table
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
SMALL = Shape(n_embd=256, n_ff=512, n_head=4, n_head_kv=2, shallow=1, deep=6)


def test_bench_measures_keeps_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    arguments = ["bench", str(model), "--tests", "pp32,tg8", "--max-seconds", "1", "--json"]
    assert main([*arguments, "--placements", "auto,cpu", "--compare", "last"]) == 0
    out, err = capsys.readouterr()
    assert "no earlier bench has a row of this one" in err
    first = json.loads(out)
    assert first["comparison"] == []
    assert [(row["placement"], row["test"]) for row in first["rows"]] == [
        *(("auto", "pp32"), ("auto", "tg8"), ("cpu", "pp32"), ("cpu", "tg8"))
    ]
    for row in first["rows"]:
        assert row["tokens_per_second"] > 0
        assert len(row["rounds"]) >= 3
        assert (row["bandwidth_share"] is None) == row["test"].startswith("pp")
    assert first["machine"]["ram_bytes_per_s"] > 1e8
    assert main([*arguments, "--compare", "last"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert [change["test"] for change in second["comparison"]] == ["pp32", "tg8"]
    assert second["comparison"][0]["before"] == first["rows"][0]["tokens_per_second"]
    assert len(history_file().read_text().splitlines()) == 2
    planned = [row for row in first["rows"] + second["rows"] if (row["placement"], row["test"]) == ("auto", "tg8")]
    assert bool(calibration_of(this_machine(measure=False))) == any(not row["noisy"] for row in planned)


@pytest.mark.parametrize("type_name", ["F16", "Q8_0", "Q4_K", "IQ2_XXS", "TQ2_0"])
def test_a_model_of_one_type_is_of_that_type(type_name: str, tmp_path: Path) -> None:
    header = read_header(write_model(tmp_path / "m.gguf", type_name, SMALL, 2))
    matrices = [t for t in header.tensors.values() if t.name.startswith("blk.") and "norm" not in t.name]
    assert {t.type for t in matrices} == {type_name}
    assert len(matrices) == 14
    assert SMALL.weights_between == 5 * sum(t.n_elements for t in matrices) // 2


def test_types_are_timed(tmp_path: Path) -> None:
    found = measure_types(["Q8_0", "F32"], n_threads=1, rounds=1, shape=SMALL)
    assert set(found) == {"Q8_0", "F32"}
    write_table(tmp_path / "t.toml", found, "m", 1)
    assert set(read_speed_table(tmp_path / "t.toml").seconds) == {"Q8_0", "F32"}
