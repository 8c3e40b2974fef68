"""Which device holds what, of a choice: layers, their experts, the output; and the bytes that come together there.

Takes facts and a choice, gives :class:`Residence`. The rules are those of llama_model::load_tensors
(src/llama-model.cpp): -ngl counts from the last layer, the output behind it; what devices do not hold is in RAM.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dynrun.runtime.memory import (
    cache_bytes,
    compute_bytes,
    host_compute_bytes,
    mmproj_bytes,
    offload_bytes,
    output_compute_bytes,
    pipeline_bytes,
    process_bytes,
)
from dynrun.runtime.model_facts import ModelFacts
from dynrun.runtime.placement import Choice

CPU = -1
MIB = 1 << 20


@dataclass(frozen=True)
class Residence:
    """``layer_on``: the index of each layer's device in ``choice.devices``, ``CPU`` for RAM; ``output_on`` likewise;
    ``experts_in_ram``: the layers whose experts are in RAM while the rest is on a device."""

    layer_on: tuple[int, ...]
    output_on: int
    experts_in_ram: frozenset[int]

    def experts_on(self, layer: int) -> int:
        """Where the experts of a layer are."""
        return CPU if layer in self.experts_in_ram else self.layer_on[layer]

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU computes any of it."""
        return CPU in self.layer_on or bool(self.experts_in_ram) or self.output_on == CPU

    @property
    def used(self) -> frozenset[int]:
        """The devices that hold anything."""
        return frozenset({*self.layer_on, self.output_on}) - {CPU}


def residence(facts: ModelFacts, choice: Choice) -> Residence:
    """Where everything is. ``choice.layers_of`` counts the output as one more layer."""
    counts = choice.layers_of or (choice.n_gpu_layers,)
    places = [device for device, n in enumerate(counts) for _ in range(n)]
    n_items = facts.n_layer + 1
    places = [CPU] * (n_items - len(places)) + places[-n_items:] if places else [CPU] * n_items
    in_ram = facts.moe_layers[len(facts.moe_layers) - choice.n_cpu_moe :] if choice.n_cpu_moe else ()
    return Residence(
        layer_on=tuple(places[:-1]),
        output_on=places[-1],
        experts_in_ram=frozenset(layer for layer in in_ram if places[layer] != CPU),
    )


@dataclass(frozen=True)
class Ledger:
    """Bytes of each device by its index (of ``CPU``: in RAM): weights, caches, compute buffers and the rest."""

    weights: dict[int, int]
    caches: dict[int, int]
    compute: dict[int, int]
    other: dict[int, int]

    def total(self, device: int) -> int:
        """All that lies on a device."""
        parts = (self.weights, self.caches, self.compute, self.other)
        return sum(part.get(device, 0) for part in parts)


def ledger(facts: ModelFacts, choice: Choice, found: Residence, discrete: bool) -> Ledger:
    """What lies where. ``discrete``: devices have memory of their own, so that experts in RAM are copied to them to
    compute prompts."""
    weights, caches = {CPU: facts.input_bytes}, {CPU: 0}
    for number, layer in enumerate(facts.layers):
        here, there = found.layer_on[number], found.experts_on(number)
        weights[here] = weights.get(here, 0) + layer.dense_bytes
        weights[there] = weights.get(there, 0) + layer.expert_bytes
        caches[here] = caches.get(here, 0) + cache_bytes(layer.cache, choice)
    # Tied embeddings are stored once only where the table and the output are in the same order in the same memory.
    once = found.output_on == CPU and choice.load_mode != "read"
    output = facts.output_bytes - (facts.output_copy_bytes if once else 0)
    weights[found.output_on] = weights.get(found.output_on, 0) + output
    images = mmproj_bytes(choice.mmproj_bytes)
    first = min(found.used, default=CPU) if choice.mmproj_on_gpu else CPU
    n_contexts = len(found.used) if discrete else 0
    other = {CPU: process_bytes(facts, choice, n_contexts) + choice.prompt_cache_mib * MIB}
    other[first] = other.get(first, 0) + images
    return Ledger(weights, caches, _compute(facts, choice, found, discrete), other)


def _compute(facts: ModelFacts, choice: Choice, found: Residence, discrete: bool) -> dict[int, int]:
    whole = compute_bytes(facts, choice)
    copied = offload_bytes(facts, choice.n_cpu_moe) if discrete and found.experts_in_ram else 0
    compute = dict.fromkeys(found.used, whole + copied)
    compute[CPU] = whole if found.on_cpu else host_compute_bytes(facts, choice)
    if not found.on_cpu and len(choice.layers_of) > 1:
        for device in compute:
            compute[device] += pipeline_bytes(facts, choice, None if device == CPU else device)
    if found.output_on != CPU and found.output_on not in found.layer_on:
        compute[found.output_on] = output_compute_bytes(facts, choice)
    return compute


def runs(found: Residence) -> Iterator[tuple[int, int, int]]:
    """Runs of layers in one place: first, last, device."""
    first = 0
    for layer in range(1, len(found.layer_on) + 1):
        if layer == len(found.layer_on) or found.layer_on[layer] != found.layer_on[first]:
            yield first, layer - 1, found.layer_on[first]
            first = layer
