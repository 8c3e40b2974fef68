"""This machine as the planner sees it, what is measured of it once, and what measured speeds teach."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dynrun.errors import DynrunError
from dynrun.runtime import bandwidth, this_machine
from dynrun.runtime.calibration import calibration_of, note_speed
from dynrun.runtime.machine import GIB, Machine
from dynrun.runtime.placement import Wishes
from dynrun.runtime.plan import plan
from dynrun.runtime.speed import raw_speed
from tests.unit.test_plan import MACHINES, facts

LISTED = (
    "CUDA0: NVIDIA GeForce RTX 4090 (24217 MiB, 23842 MiB free)",
    "Vulkan0: Some (odd) GPU (8192 MiB, 100 MiB free)",
)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with devices, whose bandwidths are measured as told."""
    told = SimpleNamespace(backend="cuda", listed=LISTED, ram=[50e9], devices=[[900e9, 300e9]], measured=0)

    def ram(n_threads: int, free_bytes: int) -> float:
        told.measured += 1
        return told.ram[min(told.measured, len(told.ram)) - 1]

    monkeypatch.setattr(this_machine, "installation", lambda: told)
    monkeypatch.setattr(this_machine.tools, "devices", lambda: list(told.listed))
    monkeypatch.setattr(bandwidth, "ram_bytes_per_s", ram)
    monkeypatch.setattr(bandwidth, "cuda_bytes_per_s", lambda: told.devices[min(told.measured, len(told.devices)) - 1])
    return told


class TestDevices:
    def test_are_those_that_llama_cpp_lists(self, build: SimpleNamespace) -> None:
        one, other = this_machine.this_machine().devices
        assert (one.name, one.description) == ("CUDA0", "NVIDIA GeForce RTX 4090")
        assert (one.total_bytes, one.free_bytes) == (24217 << 20, 23842 << 20)
        assert other.description == "Some (odd) GPU"

    def test_none_are_asked_for_without_a_backend(
        self, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build.backend = "cpu"
        monkeypatch.setattr(this_machine.tools, "devices", lambda: pytest.fail("it starts llama-server for nothing"))
        assert this_machine.this_machine().devices == ()

    def test_metal_shares_the_memory(self, build: SimpleNamespace) -> None:
        build.backend, build.listed = "metal", ("MTL0: Apple M4 Max (28672 MiB, 28672 MiB free)",)
        machine = this_machine.this_machine()
        assert machine.unified
        assert machine.devices[0].bytes_per_s == 546e9

    def test_a_line_of_another_form_is_said(self, build: SimpleNamespace) -> None:
        build.listed = ("CUDA0: a mystery",)
        with pytest.raises(DynrunError, match="a mystery"):
            this_machine.this_machine()


class TestBandwidths:
    def test_are_measured_once(self, build: SimpleNamespace) -> None:
        one, other = this_machine.this_machine(), this_machine.this_machine()
        assert (one.ram_bytes_per_s, one.basis, build.measured) == (50e9, "measured", 1)
        assert [device.bytes_per_s for device in one.devices] == [900e9, 300e9]
        assert other.devices == one.devices

    def test_without_measuring_they_are_the_data_sheets(self, build: SimpleNamespace) -> None:
        machine = this_machine.this_machine(measure=False)
        assert (machine.basis, build.measured) == ("estimated", 0)
        assert machine.devices[0].bytes_per_s == 1008e9

    def test_measured_again_the_higher_one_is_kept(self, build: SimpleNamespace) -> None:
        build.ram, build.devices = [50e9, 80e9, 40e9], [[900e9, 300e9], [800e9, 310e9], [1.0, 1.0]]
        this_machine.this_machine()
        again = this_machine.this_machine(again=True)
        assert again.ram_bytes_per_s == 80e9
        assert [device.bytes_per_s for device in again.devices] == [900e9, 310e9]
        assert this_machine.this_machine(again=True).ram_bytes_per_s == 80e9

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"x": 1}', '{"x": {"ram": "fast", "devices": []}}'])
    def test_a_damaged_file_is_measured_anew(self, text: str, build: SimpleNamespace, private_cache: Path) -> None:
        private_cache.mkdir(parents=True)
        (private_cache / "bandwidths.json").write_text(text)
        assert this_machine.this_machine().basis == "measured"
        assert json.loads((private_cache / "bandwidths.json").read_text())

    def test_what_cannot_be_kept_is_measured_all_the_same(self, build: SimpleNamespace, private_cache: Path) -> None:
        private_cache.write_text("in the way")
        assert this_machine.this_machine().basis == "measured"

    def test_ram_is_really_read(self) -> None:
        # Between a floppy disk and any memory there is.
        assert 1e7 < bandwidth.ram_bytes_per_s(2, GIB) < 1e14

    @pytest.mark.parametrize(
        ("name", "gb"),
        [
            *(("NVIDIA GeForce RTX 4090", 1008), ("NVIDIA H100 80GB HBM3", 3350), ("NVIDIA H100 PCIe", 2000)),
            *(("NVIDIA A100-SXM4-80GB", 2039), ("NVIDIA A100-SXM4-40GB", 1555), ("Apple M1", 68), ("NVIDIA L4", 300)),
            *(("Apple M3 Ultra", 819), ("AMD Radeon RX 7900 XTX", 960), ("NVIDIA L40S", 864), ("Quadro K600", None)),
        ],
    )
    def test_data_sheets_go_by_name(self, name: str, gb: float | None) -> None:
        assert bandwidth.data_sheet(name) == (None if gb is None else gb * 1e9)


class TestCalibration:
    def learned(self, machine: Machine, *factors: float) -> Machine:
        model = facts("gemma-3-27b Q4_K_M")
        found = plan(model, machine, Wishes(n_ctx=4096))
        for factor in factors:
            note_speed(model, machine, found, raw_speed(model, found.choice, machine) * factor)
        return replace(machine, calibration=calibration_of(machine))

    def test_a_measured_speed_is_predicted_next_time(self, private_cache: Path) -> None:
        machine, model = MACHINES["desktop-24-64"], facts("gemma-3-27b Q4_K_M")
        before = plan(model, machine, Wishes(n_ctx=4096))
        after = plan(model, self.learned(machine, 0.5, 0.6, 0.55), Wishes(n_ctx=4096))
        assert (before.basis, after.basis) == ("estimated", "calibrated")
        assert after.tokens_per_second == pytest.approx(0.55 * before.tokens_per_second)

    def test_it_is_of_the_place_and_the_machine(self, private_cache: Path) -> None:
        machine = self.learned(MACHINES["desktop-24-64"], 0.5)
        assert set(machine.calibration) == {"gpu:Q4_K", "gpu"}
        assert calibration_of(MACHINES["laptop-8-16"]) == {}
        # Another type in the same place is off by as much, as far as is known.
        assert plan(facts("gemma-3-27b Q3_K_M"), machine, Wishes(n_ctx=4096)).basis == "calibrated"

    def test_fast_mixed_placements_do_not_displace_whole_ones(self) -> None:
        machine, model = MACHINES["desktop-24-64"], facts("gemma-3-27b Q4_K_M")
        for calibration in ({"mixed": 9.0}, {"gpu": 0.1}, {"gpu": 0.2, "mixed": 3.0}):
            assert plan(model, replace(machine, calibration=calibration), Wishes(n_ctx=4096)).verdict == "gpu"

    def test_a_device_slower_than_the_cpu_is_left_alone(self) -> None:
        machine = replace(MACHINES["desktop-24-64"], calibration={"gpu": 0.02, "cpu": 1.0})
        assert plan(facts("gemma-3-27b Q4_K_M"), machine, Wishes(n_ctx=4096)).verdict == "ram"

    @pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf"), 1e9, 1e-9])
    def test_what_is_no_speed_teaches_nothing(self, factor: float, private_cache: Path) -> None:
        assert self.learned(MACHINES["desktop-24-64"], factor).calibration == {}

    def test_only_the_newest_count(self, private_cache: Path) -> None:
        machine = self.learned(MACHINES["desktop-24-64"], *[2.0] * 20, *[0.5] * 9)
        assert machine.calibration["gpu"] == pytest.approx(0.5)

    def test_the_cache_need_not_be_there(self) -> None:
        assert self.learned(MACHINES["desktop-24-64"], 0.5).calibration["gpu"] == pytest.approx(0.5)
