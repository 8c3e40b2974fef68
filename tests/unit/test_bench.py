"""Benches without a model: tests and placements in words, when to stop, what is kept and compared.

llama-bench is a script of the test's own that answers as llama-bench does, with speeds that the test gives.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynrun.allocation.speed import read_speed_table
from dynrun.cli.app import main
from dynrun.errors import NotFoundError, UsageError
from dynrun.gguf.header import read_header
from dynrun.llamacpp.build import RECORD, installation
from dynrun.runtime.bench import Limits, Setup, Workload, bench, parse_tests
from dynrun.runtime.bench_history import comparisons, history_file, keep, last_like, read_result
from dynrun.runtime.bench_setups import bench_options, parse_placements, setups
from dynrun.runtime.machine import Device, Machine
from dynrun.runtime.model_facts import facts_of
from dynrun.runtime.placement import Choice
from dynrun.runtime.plan import placed
from dynrun.runtime.type_speed import write_table
from tests.tiny import write_tiny_llama

SCRIPT = """#!{python}
import json, pathlib, sys
here = pathlib.Path(__file__).parent
count = here / "count"
n = int(count.read_text()) if count.exists() else 0
count.write_text(str(n + 1))
options = dict(zip(sys.argv[1::1], sys.argv[2::1]))
speeds = json.loads((here / "speeds.json").read_text())
speed = speeds[min(n, len(speeds) - 1)]
samples = [speed] * int(options["-r"])
row = {{"n_prompt": int(options["-p"]), "n_gen": int(options["-n"]), "n_depth": int(options["-d"])}}
print(json.dumps([{{**row, "avg_ts": speed, "stddev_ts": 0.0, "samples_ts": samples}}]))
"""
Speeds = Callable[[list[float]], None]


@pytest.fixture
def llama_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Speeds]:
    """Gives the speed of each run in turn; the last one goes on."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "llama-bench"
    program.write_text(SCRIPT.format(python=sys.executable))
    program.chmod(0o755)
    record = {"bin": str(folder), "fingerprint": "f", "backend": "cpu", "commit": "0c1e570"}
    (tmp_path / RECORD).write_text(json.dumps(record))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    installation.cache_clear()

    def speeds(values: list[float]) -> None:
        (folder / "speeds.json").write_text(json.dumps(values))

    yield speeds
    installation.cache_clear()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf")


def test_tests_are_written_as_llama_bench_names_them() -> None:
    assert parse_tests("pp512, TG128,tg32@d4096") == (Workload(512), Workload(0, 128), Workload(0, 32, 4096))
    assert [test.name for test in parse_tests("pp512,tg32@d4096")] == ["pp512", "tg32@d4096"]
    for wrong in ("", "pp0", "tg", "512", "tg4@4096"):
        with pytest.raises(UsageError, match="is no test"):
            parse_tests(wrong)


def test_placements_become_options(model: Path) -> None:
    machine = Machine("m", (), 1 << 34, 1 << 34, 40e9, 2)
    planned = placed(facts_of(read_header(model)), machine, Choice(512, type_k="q8_0", type_v="q8_0"))
    made = setups("m", model, parse_placements("auto,cpu,ngl=3+ncmoe=2"), planned, bytes_per_s=1e9, rpc=["h:1"])
    options = [setup.options for setup in made]
    assert options[0][:2] == ("-rpc", "h:1")
    assert "-ctk q8_0 -ctv q8_0" in " ".join(options[0])
    assert options[1:] == [("-rpc", "h:1", "-ngl", "0"), ("-rpc", "h:1", "-ngl", "3", "-ncmoe", "2")]
    assert [setup.planned is not None for setup in made] == [True, False, False]
    assert made[0].bytes_per_token == planned.bytes_per_token
    assert made[2].bytes_per_token == 0, "what lies where is not known"
    for wrong in ("fast", "ngl=", "ngl=1+x", ","):
        with pytest.raises(UsageError):
            parse_placements(wrong)


def test_several_overrides_are_joined_as_llama_bench_wants_them(tmp_path: Path) -> None:
    moe = facts_of(read_header(write_tiny_llama(tmp_path / "moe.gguf", n_expert=4)))
    machine = Machine(
        "m", (Device("A", "a", 1 << 34, 1 << 34, 1e9), Device("B", "b", 1 << 34, 1 << 34, 1e9)), 1, 1, 1, 1
    )
    choice = Choice(512, n_gpu_layers=3, n_cpu_moe=1, layers_of=(1, 2), devices=("A", "B"))
    options = bench_options(placed(moe, machine, choice))
    assert options[options.index("-ts") + 1] == "1/2"
    assert options[options.index("-ot") + 1].endswith("=CPU")


def test_a_quiet_machine_is_measured_three_times(llama_bench: Speeds, model: Path) -> None:
    llama_bench([100.0])
    found = bench([Setup("m", model, "cpu", ("-ngl", "0"))], parse_tests("tg8"), Limits(), n_threads=1)
    (row,) = found.rows
    assert row.rounds == (100.0,) * 3
    assert (row.noisy, row.tokens_per_second, row.ci95) == (False, 100.0, (100.0, 100.0))


def test_a_noisy_one_until_the_interval_is_small(llama_bench: Speeds, model: Path) -> None:
    # Anchor and test in turn.
    llama_bench([100, 80, 100, 120, 100, 90, 100, 100])
    found = bench([Setup("m", model, "cpu", ())], parse_tests("tg8"), Limits(0.1), n_threads=1)
    (row,) = found.rows
    assert len(row.rounds) > 5
    assert not row.noisy
    assert not found.drifted


def test_the_time_is_not_overdrawn_and_noise_is_told(llama_bench: Speeds, model: Path) -> None:
    llama_bench([100, 80, 100, 120, 100, 90])
    found = bench([Setup("m", model, "cpu", ())], parse_tests("tg8"), Limits(0.0001, 0.01), n_threads=1)
    assert len(found.rows[0].rounds) == 3
    assert found.rows[0].noisy


def test_a_machine_that_throttles_is_seen_by_the_anchor(llama_bench: Speeds, model: Path) -> None:
    llama_bench([100, 100, 95, 95, 90, 90, 85, 85, 80])
    found = bench([Setup("m", model, "cpu", ())], parse_tests("tg8"), Limits(0.0001, 0.01), n_threads=1)
    assert found.drifted
    assert found.drift is not None
    assert found.drift.change == pytest.approx(-0.15, abs=0.03)


def result(speeds: list[float], model: str = "m", size: int = 1) -> dict[str, Any]:
    row = {"model": model, "size_bytes": size, "placement": "auto", "test": "tg8", "rounds": speeds}
    return {"rows": [{**row, "tokens_per_second": sum(speeds) / len(speeds)}]}


def test_the_last_bench_with_the_same_rows_is_compared_with(tmp_path: Path) -> None:
    now = result([110, 111, 109])
    assert last_like(now) is None
    for kept in (result([90, 91, 89]), result([100, 101, 99]), result([1, 2], "other"), result([1, 2], size=2)):
        keep(kept)
    with history_file().open("a") as stream:
        stream.write('{"rows": [{"torn')
    found = last_like(now)
    assert found is not None
    (change,) = comparisons(found, now)
    assert (change.before, change.after, change.change.verdict) == (100, 110, "faster")
    written = tmp_path / "before.json"
    written.write_text(json.dumps(result([200, 201, 199]), indent=1))
    assert comparisons(read_result(written), now)[0].change.verdict == "slower"
    assert comparisons(read_result(written), result([200, 202, 197]))[0].change.verdict == (
        "no difference beyond noise"
    )


@pytest.mark.parametrize("text", ["", "{}", '{"rows": [{}]}', "[1]", '{"rows": [{"model": "m", "rounds": ["x"]}]}'])
def test_a_file_that_holds_no_bench_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="holds no bench"):
        read_result(path)
    with pytest.raises(NotFoundError):
        read_result(tmp_path / "none.json")


def test_a_file_to_compare_with_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tmp_path / "none.gguf"), "--compare", str(tmp_path / "none.json")]) == 4
    assert "none.json does not exist" in capsys.readouterr().err


def test_a_table_of_types_is_what_allocation_reads(llama_bench: Speeds, tmp_path: Path) -> None:
    path = tmp_path / "cpu.toml"
    write_table(path, {"Q4_K": 0.045, "F16": 0.2}, 'a "CPU"', 2)
    table = read_speed_table(path)
    assert table.seconds == {"Q4_K": pytest.approx(4.5e-11), "F16": pytest.approx(2e-10)}


def test_bench_asks_which_model_and_refuses_models_beside_types(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench"]) == 2
    assert "which model?" in capsys.readouterr().err
    assert main(["bench", "demo", "--types", str(tmp_path / "t.toml")]) == 2
    assert "models of its own" in capsys.readouterr().err
