"""The machine that a model is planned for: its memory, its devices, how fast they read.

A :class:`Machine` is this one (:func:`this_machine`), or any other, written down as TOML (:func:`read_machine`)::

    name = "desktop"
    ram_gib = 64
    ram_gb_per_s = 60            # optional, as every bandwidth: else a typical one, marked as estimated
    cores = 8
    [[device]]
    name = "CUDA0"
    memory_gib = 24
    gb_per_s = 1008

``unified = true`` makes the RAM the devices' memory too (Apple silicon); their memory_gib may be left out then.

Measures nothing itself: bandwidth.py does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dynrun.artifacts import read_toml
from dynrun.errors import UsageError

GIB = 1 << 30
Basis = Literal["measured", "calibrated", "estimated"]
# Bytes per second where nobody has measured: two channels of DDR4; a GPU of the middle; an Apple chip without a suffix.
_RAM_BYTES_PER_S, _GPU_BYTES_PER_S, _UNIFIED_BYTES_PER_S, _DISK_BYTES_PER_S = 40e9, 400e9, 100e9, 1.5e9
# Metal lets a process use so much of the unified memory (recommendedMaxWorkingSetSize on machines over 36 GB is 3/4).
_WORKING_SET = 0.75
# What the system and other programs keep of a virtual machine's memory.
_SYSTEM_BYTES = 2 * GIB


@dataclass(frozen=True)
class Device:
    """A GPU as llama.cpp names it. ``free_bytes`` is what a model may use; of a unified machine, of the one pool."""

    name: str
    description: str
    total_bytes: int
    free_bytes: int
    bytes_per_s: float


@dataclass(frozen=True)
class Machine:
    """``ram_free_bytes``: what programs can still have; ``disk_bytes_per_s`` of weights that no memory holds.

    ``unified``: the devices' memory and the RAM are one pool. ``repacked``: tensor types that llama.cpp stores in
    another order for this CPU (AMX, AVX2, NEON), in memory of their own beside the mapped file. ``basis`` says where
    the bandwidths are from; ``calibration``: measured over predicted speed, by kind of placement (calibration.py).
    """

    name: str
    devices: tuple[Device, ...]
    ram_bytes: int
    ram_free_bytes: int
    ram_bytes_per_s: float
    cores: int
    unified: bool = False
    disk_bytes_per_s: float = _DISK_BYTES_PER_S
    repacked: tuple[str, ...] = ()
    basis: Basis = "estimated"
    calibration: Mapping[str, float] = field(default_factory=dict)

    def named(self, names: Iterable[str]) -> tuple[Device, ...]:
        """The devices of these names. Raises UsageError for one that the machine lacks."""
        known = {device.name: device for device in self.devices}
        try:
            return tuple(known[name] for name in names)
        except KeyError as error:
            raise UsageError(
                f"{self.name} has no device {error}", fix=f"it has {', '.join(known) or 'none'}"
            ) from error


_KEYS = {
    "name": str,
    "ram_gib": float,
    "ram_free_gib": float,
    "ram_gb_per_s": float,
    "disk_gb_per_s": float,
    "cores": int,
    "unified": bool,
    "basis": str,
    "device": list,
}
_DEVICE_KEYS = {"name": str, "description": str, "memory_gib": float, "free_gib": float, "gb_per_s": float}


def read_machine(path: Path) -> Machine:
    """A machine written down as TOML (above). Raises NotFoundError, UsageError."""
    data = read_toml(path, "--machine")
    _check(data, _KEYS, str(path))
    tables = data.get("device", [])
    for table in tables:
        _check(table, _DEVICE_KEYS, f"{path}, [[device]]")
    if "ram_gib" not in data:
        raise UsageError(f"{path} says nothing of the memory", fix="add a line as ram_gib = 64")
    return _machine(path, data, tables)


def _machine(path: Path, data: dict[str, Any], tables: list[dict[str, Any]]) -> Machine:
    ram, unified = int(data["ram_gib"] * GIB), bool(data.get("unified", False))
    free = int(data["ram_free_gib"] * GIB) if "ram_free_gib" in data else max(ram - _SYSTEM_BYTES, ram // 2)
    speed = data.get("ram_gb_per_s", (_UNIFIED_BYTES_PER_S if unified else _RAM_BYTES_PER_S) / 1e9) * 1e9
    devices = tuple(_device(path, table, ram, speed if unified else None) for table in tables)
    names = [device.name for device in devices]
    if len(set(names)) != len(names):
        raise UsageError(f"{path} names a device twice", fix="give each its own name, as CUDA0, CUDA1")
    return Machine(
        name=data.get("name", path.stem),
        devices=devices,
        ram_bytes=ram,
        ram_free_bytes=min(free, ram),
        ram_bytes_per_s=speed,
        cores=int(data.get("cores", 8)),
        unified=unified,
        disk_bytes_per_s=data.get("disk_gb_per_s", _DISK_BYTES_PER_S / 1e9) * 1e9,
        basis=data.get("basis", "estimated"),
    )


def _device(path: Path, table: dict[str, Any], ram: int, pool_bytes_per_s: float | None) -> Device:
    if "name" not in table or (pool_bytes_per_s is None and "memory_gib" not in table):
        raise UsageError(f"{path}: a [[device]] lacks name or memory_gib", fix="add them")
    total = int(table["memory_gib"] * GIB) if "memory_gib" in table else int(ram * _WORKING_SET)
    free = int(table["free_gib"] * GIB) if "free_gib" in table else total
    speed = table["gb_per_s"] * 1e9 if "gb_per_s" in table else pool_bytes_per_s or _GPU_BYTES_PER_S
    return Device(table["name"], table.get("description", table["name"]), total, min(free, total), speed)


def _check(table: Any, keys: dict[str, type], where: str) -> None:
    if not isinstance(table, dict):
        raise UsageError(f"{where} is no table", fix="see `dynrun plan --help`")
    for key, value in table.items():
        if key not in keys:
            raise UsageError(f"{where}: unknown key {key!r}", fix=f"known: {', '.join(keys)}")
        kind = keys[key]
        fits = isinstance(value, int | float) and type(value) is not bool if kind is float else type(value) is kind
        # Not <=: a nan fails it too.
        if not fits or (kind in (float, int) and not 0 < value < float("inf")):
            raise UsageError(f"{where}: {key} is {value!r:.60}", fix=f"give {_WANTED[kind]}")
    if table.get("basis", "estimated") not in ("measured", "calibrated", "estimated"):
        raise UsageError(f"{where}: basis is {table['basis']!r:.60}", fix="measured, calibrated or estimated")


_WANTED = {float: "a positive number", int: "a positive integer", str: "a text", bool: "true or false", list: "tables"}
