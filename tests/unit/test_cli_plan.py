"""`dynrun plan`, `dynrun lint` and `make --fit` as users call them: on files, on the Hub, for other machines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynrun.cli.app import main
from dynrun.errors import DoesNotFitError, UsageError
from dynrun.runtime.fit import fit
from dynrun.runtime.machine import GIB, read_machine
from dynrun.runtime.placement import Wishes
from tests.hub_server import Fault, Hub, serving_here
from tests.shapes import shape_header, write_sparse
from tests.tiny import write_tiny_llama
from tests.unit.test_plan import MACHINES, TESTS

REPOSITORY = "unsloth/Tiny-1B-Instruct-GGUF"
DESKTOP = ("--machine", str(TESTS / "machines" / "desktop-24-64.toml"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "t.gguf", n_embd=64, n_ff=64, n_block=1).read_bytes()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: bytes) -> Iterator[Hub]:
    with serving_here(monkeypatch, tmp_path) as served:
        served.models[REPOSITORY] = {
            "Tiny-Q4_K_M.gguf": model,
            "Tiny-Q8_0.gguf": model + bytes(64),
            "Tiny-IQ2_M.gguf": b"GGUF\3\0\0\0" + bytes(100),
            "Tiny-BF16-00001-of-00002.gguf": model,
            "mmproj-F16.gguf": b"mmproj",
            "config.json": b'{"hidden_size": 64, "num_attention_heads": 8}',
        }
        yield served


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


class TestPlan:
    def test_a_file_for_another_machine(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_sparse(tmp_path / "gemma.gguf", "gemma-3-27b", "Q4_K")
        code, out, _ = run(capsys, "plan", str(path), *DESKTOP, "--ctx", "8192", "--json")
        assert code == 0
        data = json.loads(out)
        (row,) = data["placements"]
        assert (row["verdict"], data["recommended"]) == ("gpu", "Q4_K")
        assert row["device_bytes"]["CUDA0"] < 24 * GIB
        assert row["command"][:3] == ["llama-server", "-m", str(path)]
        assert row["command"][3:] == row["argv"]
        assert row["map"] == ["CUDA0: layers 0–61 and the output"]
        assert set(row["basis"].values()) <= {"measured", "calibrated", "estimated"}

    def test_people_see_the_verdict_the_map_and_the_command(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = write_sparse(tmp_path / "scout.gguf", "llama-4-scout", "IQ2_XXS")
        code, out, _ = run(capsys, "plan", str(path), *DESKTOP)
        assert code == 0
        assert "GPU and RAM" in out
        assert "RAM: the experts of layers" in out
        assert r"-ot 'blk\.(" in out
        assert "m measured, c calibrated, e estimated" in out

    def test_every_quant_of_a_repository_by_a_few_kilobytes(
        self, hub: Hub, capsys: pytest.CaptureFixture[str], model: bytes
    ) -> None:
        code, out, err = run(capsys, "plan", "unsloth/Tiny-1B-Instruct", *DESKTOP, "--json")
        assert code == 0
        data = json.loads(out)
        rows = {row["quant"]: row for row in data["placements"]}
        assert set(rows) == {"Q4_K_M", "Q8_0", "IQ2_M", "BF16"}
        assert data["model"] == REPOSITORY
        assert rows["Q8_0"]["verdict"] in ("gpu", "ram")
        assert rows["Q8_0"]["download_bytes"] == len(model) + 64
        assert "--mmproj" in rows["Q8_0"]["argv"]
        assert "holds no language model" in rows["IQ2_M"]["fault"]
        assert "lacks the shards 2" in rows["BF16"]["fault"]
        assert data["recommended"] == "Q8_0"
        assert "taking" in err

    def test_one_quant(self, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = run(capsys, "plan", f"{REPOSITORY}:q4_k_m", *DESKTOP, "--json")
        assert code == 0
        assert [row["quant"] for row in json.loads(out)["placements"]] == ["Q4_K_M"]

    def test_names_in_a_table(self, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = run(capsys, "plan", REPOSITORY, *DESKTOP)
        assert code == 0
        assert "disk: 0.0 GiB to download" in out
        assert "$ llama-server -m Tiny-Q8_0.gguf" in out

    def test_nothing_fits(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_sparse(tmp_path / "gemma.gguf", "gemma-3-27b", "Q4_K")
        (tmp_path / "m.toml").write_text("ram_gib = 1\nram_free_gib = 0.1\n")
        code, out, _ = run(capsys, "plan", str(path), "--machine", str(tmp_path / "m.toml"))
        assert code == 5
        assert "does not fit" in out
        assert "GiB of RAM" in out

    @pytest.mark.parametrize(
        ("arguments", "code", "telling"),
        [
            (("nobody/nothing", *DESKTOP), 4, "nobody/nothing"),
            (("MODEL", "--machine", "none.toml"), 4, "none.toml does not exist"),
            (("MODEL", *DESKTOP, "--kv", "q9"), 2, "no KV cache type 'q9'"),
            (("MODEL", *DESKTOP, "--kv", "f16,f16,f16"), 2, "more than two types"),
            (("MODEL", *DESKTOP, "--mmproj", "none.gguf"), 4, "none.gguf does not exist"),
            (("MODEL", *DESKTOP, "--ctx", "0"), 2, "--ctx"),
        ],
    )
    def test_what_is_wrong_is_one_line(
        self,
        arguments: tuple[str, ...],
        code: int,
        telling: str,
        hub: Hub,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        path = write_tiny_llama(tmp_path / "t.gguf")
        got, _, err = run(capsys, "plan", *(str(path) if word == "MODEL" else word for word in arguments))
        assert got == code
        assert telling in err.splitlines()[-1]

    def test_a_server_that_fails_ends_it(
        self, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dynrun.hub.ranges._ATTEMPTS", 1)
        hub.fault = lambda path, start, end: Fault("500")
        code, _, err = run(capsys, "plan", REPOSITORY, *DESKTOP)
        assert code in (3, 4)
        assert err.splitlines()[-1].startswith("dynrun: ")


class TestMachines:
    @pytest.mark.parametrize(
        ("text", "telling"),
        [
            ("ram_gib = ", "not valid TOML"),
            ("", "says nothing of the memory"),
            ("ram_gib = -1", "ram_gib is -1"),
            ("ram_gib = true", "ram_gib is True"),
            ("ram_gib = nan", "ram_gib is nan"),
            ("ram_gib = 8\nwings = 2", "unknown key 'wings'"),
            ("ram_gib = 8\ndevice = 3", "device is 3"),
            ("ram_gib = 8\n[[device]]\nmemory_gib = 8", "lacks name or memory_gib"),
            ("ram_gib = 8\n[[device]]\nname = 'A'", "lacks name or memory_gib"),
            ("ram_gib = 8\n[[device]]\nname = 'A'\nmemory_gib = 1\n[[device]]\nname = 'A'\nmemory_gib = 1", "twice"),
            ("ram_gib = 8\nbasis = 'guessed'", "basis is 'guessed'"),
        ],
    )
    def test_a_file_that_describes_none_is_a_usage_error(self, text: str, telling: str, tmp_path: Path) -> None:
        (tmp_path / "m.toml").write_text(text)
        with pytest.raises(UsageError, match=r"m\.toml") as caught:
            read_machine(tmp_path / "m.toml")
        assert telling in str(caught.value)

    def test_what_is_left_out_is_typical(self, tmp_path: Path) -> None:
        (tmp_path / "mac.toml").write_text("ram_gib = 64\nunified = true\n[[device]]\nname = 'MTL0'\n")
        machine = read_machine(tmp_path / "mac.toml")
        assert machine.name == "mac"
        assert machine.devices[0].total_bytes == 48 * GIB
        assert machine.devices[0].bytes_per_s == machine.ram_bytes_per_s
        assert machine.ram_free_bytes < machine.ram_bytes


class TestFit:
    @pytest.mark.parametrize(
        ("machine", "verdict"), [("desktop-24-64", "gpu"), ("mac-36", "gpu"), ("cpu-only-64", "ram")]
    )
    def test_it_is_the_largest_that_is_held(self, machine: str, verdict: str) -> None:
        header, here = shape_header("gemma-3-27b", "F16"), MACHINES[machine]
        found = fit(header, here, Wishes(n_ctx=8192))
        assert found.placement.verdict == verdict
        assert sum(found.placement.device_bytes.values()) - found.placement.host_bytes <= sum(
            device.free_bytes for device in here.devices
        )
        assert found.bpw == 8.5 or 4 < found.bpw < 8
        more = fit(header, here, Wishes(n_ctx=4096))
        less = fit(header, here, Wishes(n_ctx=65536))
        assert less.size_bytes <= found.size_bytes <= more.size_bytes

    def test_a_model_of_experts_takes_the_ram_too(self) -> None:
        found = fit(shape_header("llama-4-scout", "F16"), MACHINES["desktop-24-64"], Wishes(n_ctx=8192))
        assert found.placement.verdict == "gpu+ram"
        assert 40 * GIB < found.size_bytes < 84 * GIB

    def test_what_no_size_fits_is_said(self) -> None:
        with pytest.raises(DoesNotFitError, match=r"1\.75 bits per weight"):
            fit(shape_header("deepseek-v3", "F16"), MACHINES["laptop-8-16"], Wishes(n_ctx=4096))

    @pytest.mark.parametrize(
        ("arguments", "code", "telling"),
        [
            (("--fit", "--quant", "Q4_K_M"), 2, "--fit and --quant both say"),
            (("--machine", "m.toml", "--quant", "Q4_K_M"), 2, "--machine goes with --fit"),
            (("--fit", "--machine", "MACHINE"), 5, "too small for this model"),
        ],
    )
    def test_make_says_what_is_wrong(
        self, arguments: tuple[str, ...], code: int, telling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path, machine = write_tiny_llama(tmp_path / "t.gguf"), tmp_path / "m.toml"
        machine.write_text("ram_gib = 0.01\n")
        words = [str(machine) if word == "MACHINE" else word for word in arguments]
        got, _, err = run(capsys, "make", str(path), *words, "--dry-run")
        assert got == code
        assert telling in err.splitlines()[-1]


class TestLint:
    def findings(self, out: str) -> dict[tuple[str, str], Any]:
        return {(one["name"], one["id"]): one for one in json.loads(out)["findings"]}

    def test_a_good_file_has_no_errors(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = run(capsys, "lint", str(write_tiny_llama(tmp_path / "t.gguf")))
        assert code == 0
        assert "no findings" in out

    def test_a_missing_shard_is_a_finding(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: bytes
    ) -> None:
        import gguf

        path = tmp_path / "t-00001-of-00002.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", 2)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        code, out, _ = run(capsys, "lint", str(path), "--json")
        assert code == 1
        assert [finding["id"] for finding in json.loads(out)["findings"]] == ["shard-missing"]

    def test_a_repository_beside_its_config(self, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
        del hub.models[REPOSITORY]["Tiny-IQ2_M.gguf"]
        code, out, _ = run(capsys, "lint", REPOSITORY, "--json")
        assert code == 1
        found = self.findings(out)
        heads = found["Q8_0", "config-differs"]
        assert (heads["key"], heads["severity"]) == ("llama.attention.head_count", "error")
        assert heads["expected"].startswith("8, num_attention_heads")
        assert heads["found"] == "4"
        assert found["BF16", "shard-missing"]["severity"] == "error"
        assert {file["config"] for file in json.loads(out)["files"]} == {f"{REPOSITORY}/config.json", ""}
