"""This machine as the planner sees it: devices as ggml's device API lists them, memory by psutil, measured bandwidths.

Gives a :class:`Machine`. What is measured (half a second for RAM, some seconds where there is a CUDA device) is kept in
the cache and measured once.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from dynrun.artifacts import write_json
from dynrun.config import available_cores, load_config
from dynrun.errors import MALFORMED, DynrunError
from dynrun.llamacpp import tools
from dynrun.llamacpp.build import installation
from dynrun.paths import cache_dir
from dynrun.runtime import bandwidth
from dynrun.runtime.calibration import calibration_of, machine_key
from dynrun.runtime.machine import Device, Machine

_GPU_BYTES_PER_S, _DISK_BYTES_PER_S = 400e9, 1.5e9
# Types that llama.cpp repacks for a CPU with these features (ggml-cpu/repack.cpp; AMX is left out of our builds).
_REPACKED = {
    "avx2": ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4"),
    "avx512f": ("Q2_K",),
    "asimddp": ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4"),
}


def this_machine(*, measure: bool = True, again: bool = False) -> Machine:
    """What is here now. Without ``measure`` nothing is measured that is not in the cache; ``again`` measures anew and
    keeps the higher of both, as the machine may have been busy. Raises DynrunError where llama.cpp is not built."""
    backend = installation().backend
    memory = psutil.virtual_memory()
    machine = Machine(
        name=_processor(),
        devices=tuple(_device(line) for line in ([] if backend == "cpu" else tools.devices())),
        ram_bytes=memory.total,
        ram_free_bytes=memory.available,
        ram_bytes_per_s=40e9,
        cores=load_config().n_threads,
        unified=backend == "metal",
        disk_bytes_per_s=_DISK_BYTES_PER_S,
        repacked=_repacked(),
    )
    machine = _with_bandwidths(machine, backend, measure, again)
    return replace(machine, calibration=calibration_of(machine))


def parse_device(line: str) -> tuple[str, str, int, int] | None:
    """Name, description, bytes in all and free, of a line of llama-server --list-devices: ``CUDA0: NAME (81008 MiB,
    80000 MiB free)`` (common/arg.cpp)."""
    match = re.fullmatch(r"(\S+): (.*) \((\d+) MiB, (\d+) MiB free\)", line)
    return (match[1], match[2], int(match[3]) << 20, int(match[4]) << 20) if match else None


def _device(line: str) -> Device:
    found = parse_device(line)
    if found is None:
        raise DynrunError(f"llama.cpp lists a device as {line!r:.120}", fix="run dynrun doctor")
    name, description, total, free = found
    return Device(name, description, total, free, bandwidth.data_sheet(description) or _GPU_BYTES_PER_S)


def _with_bandwidths(machine: Machine, backend: str, measure: bool, again: bool) -> Machine:
    """With what was measured, now or once."""
    path = cache_dir() / "bandwidths.json"
    known = _read(path)
    key = machine_key(machine)
    if again or (key not in known and measure):
        known[key] = _higher(known.get(key), _measured(machine, backend))
        # What cannot be kept is measured again: no reason not to plan.
        with suppress(DynrunError, OSError):
            write_json(path, known)
    if (found := known.get(key)) is None:
        return machine
    devices = machine.devices
    if len(found["devices"]) == len(devices):
        pairs = zip(devices, found["devices"], strict=True)
        devices = tuple(replace(device, bytes_per_s=speed) for device, speed in pairs)
    elif machine.unified:
        devices = tuple(replace(d, bytes_per_s=bandwidth.data_sheet(machine.name) or d.bytes_per_s) for d in devices)
    return replace(machine, devices=devices, ram_bytes_per_s=found["ram"], basis="measured")


def _measured(machine: Machine, backend: str) -> dict[str, Any]:
    ram = bandwidth.ram_bytes_per_s(available_cores(), machine.ram_free_bytes)
    return {"ram": ram, "devices": bandwidth.cuda_bytes_per_s() if backend in ("cuda", "hip") else []}


def _higher(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    if old is None or len(old["devices"]) != len(new["devices"]):
        return new
    devices = [max(pair) for pair in zip(old["devices"], new["devices"], strict=True)]
    return {"ram": max(old["ram"], new["ram"]), "devices": devices}


def _read(path: Path) -> dict[str, Any]:
    """What is kept; nothing where it is damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {key: known[key] for key in known if known[key]["ram"] > 0 and all(s > 0 for s in known[key]["devices"])}
    except (OSError, *MALFORMED):
        return {}


def _processor() -> str:
    if sys.platform == "darwin":
        from dynrun.llamacpp.process import capture

        return capture(("sysctl", "-n", "machdep.cpu.brand_string"), check=False).stdout.strip() or "Mac"
    model = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


def _repacked() -> tuple[str, ...]:
    if sys.platform == "darwin":
        flags = {"asimddp"} if platform.machine() == "arm64" else {"avx2"}
    else:
        flags = set(re.findall(r"\w+", _cpuinfo()))
    return tuple(dict.fromkeys(name for flag, names in _REPACKED.items() if flag in flags for name in names))


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
