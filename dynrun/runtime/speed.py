"""Predicted tokens per second: the bytes that one token reads from each memory, over that memory's bandwidth.

Takes facts, a residence and a machine; gives seconds. Text generation is bound by memory; what is not (a CPU with few
cores, launches of kernels) is in a few constants, and in the calibration of this machine's own measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from dynrun.runtime.machine import Basis, Machine
from dynrun.runtime.memory import cell_bytes
from dynrun.runtime.model_facts import ModelFacts
from dynrun.runtime.placement import Choice
from dynrun.runtime.residence import CPU, Residence, residence

# Parts of the peak bandwidth that llama.cpp reaches with one slot.
_DEVICE_SHARE, _CPU_SHARE = 0.70, 0.85
# A core unpacks so many bytes of weights a second: k-quants; types with codebooks and ternary ones.
_CORE_BYTES_PER_S, _CORE_CODEBOOK_BYTES_PER_S = 6e9, 2.5e9
# Weights in the file's order, where the CPU has kernels for another one.
_PLAIN_SHARE = 0.8
DEPTH = 4096
# Launches of a layer's kernels on a device; handing activations over from one device, or the CPU, to another.
_LAYER_S, _HANDOVER_S = 12e-6, 30e-6


@dataclass(frozen=True)
class Speed:
    """``bytes_per_token``: read for one token of text, from all memories. ``merit``: tokens per second to choose a
    placement by: what was measured of mixed placements alone must not make them look better than whole ones."""

    tokens_per_second: float
    merit: float
    basis: Basis
    bytes_per_token: int


def token_bytes(facts: ModelFacts, choice: Choice, where: Residence) -> dict[int, int]:
    """Bytes that one token reads from each device: weights, of experts the chosen ones, and
    the cache of ``DEPTH`` tokens, or of half the context where that is less."""
    read = {CPU: facts.input_row_bytes}
    depth = min(choice.n_ctx // 2, DEPTH)
    share = min(facts.n_expert_used / facts.n_expert, 1.0) if facts.n_expert else 1.0
    for number, layer in enumerate(facts.layers):
        here, there = where.layer_on[number], where.experts_on(number)
        seen = min(depth, layer.cache.window or depth)
        cache = seen * cell_bytes(layer.cache, choice) + 4 * layer.cache.state
        read[here] = read.get(here, 0) + layer.dense_bytes + cache
        read[there] = read.get(there, 0) + int(layer.expert_bytes * share)
    read[where.output_on] = read.get(where.output_on, 0) + facts.output_bytes
    return read


def predict(facts: ModelFacts, choice: Choice, where: Residence, machine: Machine, missing_share: float = 0.0) -> Speed:
    """Speed of one slot. ``missing_share``: of the weights in RAM the part that RAM has no room for, read from disk."""
    read = token_bytes(facts, choice, where)
    ram, devices = _seconds(facts, choice, where, machine, read)
    disk = read[CPU] * missing_share / machine.disk_bytes_per_s
    in_ram, on_device = (_factor(facts, machine, place) or 1.0 for place in ("cpu", "gpu"))
    merit = ram / in_ram + devices / on_device
    place = place_of(where)
    known = _factor(facts, machine, place)
    seconds = merit if known is None else (ram + devices) / known
    basis: Basis = "estimated" if known is None else "calibrated"
    return Speed(1 / (seconds + disk), 1 / (merit + disk), basis, sum(read.values()))


def raw_speed(facts: ModelFacts, choice: Choice, machine: Machine) -> float:
    """Tokens per second as predicted without a calibration."""
    where = residence(facts, choice)
    return 1 / sum(_seconds(facts, choice, where, machine, token_bytes(facts, choice, where)))


def place_of(where: Residence) -> str:
    """``cpu``, ``gpu`` or ``mixed``."""
    mixed = where.experts_in_ram or CPU in where.layer_on
    return "cpu" if not where.used else "mixed" if mixed else "gpu"


def kinds_of(facts: ModelFacts, where: Residence) -> tuple[str, str]:
    """What a calibration is for, the closest first: where the model is and its tensor type; where it is."""
    place = place_of(where)
    return f"{place}:{facts.main_type}", place


def _factor(facts: ModelFacts, machine: Machine, place: str) -> float | None:
    known = machine.calibration
    return known.get(f"{place}:{facts.main_type}", known.get(place))


def _seconds(
    facts: ModelFacts, choice: Choice, where: Residence, machine: Machine, read: dict[int, int]
) -> tuple[float, float]:
    """Of one token: for what is read from RAM, and for what is read and launched on devices."""
    devices, on_devices = machine.named(choice.devices), 0.0
    for device, nbytes in read.items():
        if device != CPU:
            on_devices += nbytes / (devices[device].bytes_per_s * _DEVICE_SHARE)
    on_devices += _LAYER_S * sum(place != CPU for place in where.layer_on) + _HANDOVER_S * _handovers(where)
    plain = _PLAIN_SHARE if choice.load_mode == "mmap-plain" else 1.0
    return read[CPU] / (_cpu_bytes_per_s(facts, machine) * plain), on_devices


def _cpu_bytes_per_s(facts: ModelFacts, machine: Machine) -> float:
    per_core = _CORE_CODEBOOK_BYTES_PER_S if facts.main_type.startswith(("IQ", "TQ")) else _CORE_BYTES_PER_S
    return min(machine.ram_bytes_per_s * _CPU_SHARE, machine.cores * per_core)


def _handovers(where: Residence) -> int:
    """How often one token's activations go from one memory to another: to experts in RAM and back, between runs."""
    places = [*where.layer_on, where.output_on]
    between = sum(a != b for a, b in pairwise(places))
    return between + 2 * len(where.experts_in_ram)
