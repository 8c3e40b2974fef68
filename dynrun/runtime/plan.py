"""From a model, a machine and wishes to a placement: the fastest one, as predicted, that fits.

Takes facts, a machine and wishes; gives a :class:`Placement`. Starts nothing and measures nothing. The objective is
predicted tokens per second (speed.py); what may be chosen is a few families of placements, in each of which less memory
means less speed, so that the largest member that fits is its best: everything on devices; everything but the experts
of the last layers; all experts and the first layers in RAM; without experts, the first layers; nothing on devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dynrun.runtime.command import argv_of, overrides_of
from dynrun.runtime.machine import GIB, Device, Machine
from dynrun.runtime.memory import (
    MIB,
    cache_bytes,
    check_cache_type,
    compute_bytes,
    mmproj_bytes,
    offload_bytes,
    pipeline_bytes,
)
from dynrun.runtime.model_facts import ModelFacts
from dynrun.runtime.placement import Choice, LoadMode, Placement, Verdict, Wishes
from dynrun.runtime.residence import CPU, Ledger, Residence, ledger, residence
from dynrun.runtime.speed import predict

# Left free on every device: what its driver, other programs and this module's formulas may be off by.
_MARGIN_BYTES, _MARGIN_SHARE = 384 * MIB, 0.02
# Contexts to choose from where none is asked for, and how much slower than the shortest the longest may be.
_CONTEXTS, _WORTH = (32768, 16384, 8192, 4096), 0.75
_MOST_PROMPT_CACHE, _PROMPT_CACHE_SHARE = 8 * GIB, 0.25
_LEAST_CTX = 512
# A step of the ladder frees at least so much of the devices' memory.
_STEP = 0.06


def plan(facts: ModelFacts, machine: Machine, wishes: Wishes) -> Placement:
    """The fastest placement that fits; where none does, the smallest, with the verdict "no" and the reason.

    Without a wish for a context: the longest of four that costs at most a quarter of the speed, and sends no layer to
    a slower memory. Raises UsageError for a wish that makes no sense.
    """
    check_cache_type(wishes.type_k)
    check_cache_type(wishes.type_v)
    if wishes.n_ctx is not None:
        return _best(facts, machine, _base(wishes, wishes.n_ctx), wishes)
    trained = facts.n_ctx_train or _CONTEXTS[-1]
    contexts = [n for n in _CONTEXTS if n <= trained] or [trained]
    found = [_best(facts, machine, _base(wishes, n_ctx), wishes) for n_ctx in contexts]
    rank = max(_rank(placement) for placement in found)
    good = [placement for placement in found if _rank(placement) == rank]
    fastest = max(good, key=lambda placement: placement.merit)
    # A longer context that pushes layers out to RAM would slow prompts down by far more than text.
    return next(p for p in good if p.merit >= _WORTH * fastest.merit and p.verdict == fastest.verdict)


def placed(facts: ModelFacts, machine: Machine, choice: Choice) -> Placement:
    """What follows from a choice, a remembered one for instance; it is not asked whether there is a better one."""
    where = residence(facts, choice)
    devices = machine.named(choice.devices)
    books = ledger(facts, choice, where, discrete=not machine.unified)
    pageable = 0 if choice.load_mode == "read" else books.weights[CPU]
    verdict, reason, missing = _judge(machine, devices, books, where, pageable)
    speed = predict(facts, choice, where, machine, missing)
    named = {device.name: books.total(index) for index, device in enumerate(devices) if index in where.used}
    return Placement(
        choice=choice,
        verdict=verdict,
        weight_bytes=sum(books.weights.values()),
        device_bytes={**named, "CPU": books.total(CPU)},
        pageable_bytes=pageable,
        kv_bytes=sum(books.caches.values()),
        compute_bytes=sum(books.compute.values()),
        overrides=overrides_of(facts, choice),
        tokens_per_second=speed.tokens_per_second if verdict != "no" else 0.0,
        bytes_per_token=speed.bytes_per_token,
        basis=speed.basis,
        argv=argv_of(facts, machine, choice),
        reason=reason,
        merit=speed.merit,
    )


def retreat(placement: Placement, facts: ModelFacts, machine: Machine, *, host: bool = False) -> Placement | None:
    """The next smaller placement after memory ran out; None where nothing is left to give up.

    More layers' experts into RAM, then more layers, then half the context. With ``host``, where it was RAM that ran
    out: the prompt cache, then the context.
    """
    choice = placement.choice
    if host and choice.prompt_cache_mib:
        return placed(facts, machine, replace(choice, prompt_cache_mib=0))
    if not host and choice.n_gpu_layers:
        for smaller in _smaller(facts, choice):
            found = placed(facts, machine, smaller)
            if _on_devices(found) <= _on_devices(placement) * (1 - _STEP):
                return found
    if choice.n_ctx // 2 >= _LEAST_CTX:
        return placed(facts, machine, replace(choice, n_ctx=choice.n_ctx // 2, prompt_cache_mib=0))
    return None


def _smaller(facts: ModelFacts, choice: Choice) -> Iterator[Choice]:
    """Choices with less and less on the devices, the order of layers kept."""
    for n_cpu_moe in range(choice.n_cpu_moe + 1, len(facts.moe_layers) + 1):
        yield replace(choice, n_cpu_moe=n_cpu_moe)
    counts = list(choice.layers_of or (choice.n_gpu_layers,))
    n_cpu_moe = len(facts.moe_layers)
    while any(counts):
        # From the device that holds most: which of them ran out is not known.
        counts[counts.index(max(counts))] -= 1
        yield replace(choice, n_cpu_moe=n_cpu_moe, n_gpu_layers=sum(counts), layers_of=tuple(counts))


def _on_devices(placement: Placement) -> int:
    return sum(nbytes for name, nbytes in placement.device_bytes.items() if name != "CPU")


def _base(wishes: Wishes, n_ctx: int) -> Choice:
    cache = wishes.prompt_cache_bytes
    return Choice(
        n_ctx=n_ctx,
        parallel=wishes.parallel,
        type_k=wishes.type_k,
        type_v=wishes.type_v,
        mmproj=wishes.mmproj,
        mmproj_bytes=wishes.mmproj_bytes,
        prompt_cache_mib=0 if cache is None else cache // MIB,
    )


def _rank(placement: Placement) -> int:
    """Placements that read weights from the disk for every token are no match for others, however predicted."""
    return {"no": 0, "disk": 1}.get(placement.verdict, 2)


def _best(facts: ModelFacts, machine: Machine, base: Choice, wishes: Wishes) -> Placement:
    found = [placed(facts, machine, choice) for choice in _candidates(facts, machine, base)]
    best = max(found, key=lambda p: (_rank(p), p.merit if p.fits else 0.0, -sum(p.device_bytes.values())))
    if wishes.prompt_cache_bytes is not None or not best.fits or best.verdict == "disk":
        return best
    left = machine.ram_free_bytes - best.host_bytes - (_on_devices(best) if machine.unified else 0)
    cache = min(_MOST_PROMPT_CACHE, max(int(left * _PROMPT_CACHE_SHARE), 0))
    return placed(facts, machine, replace(best.choice, prompt_cache_mib=cache // MIB))


def _candidates(facts: ModelFacts, machine: Machine, base: Choice) -> Iterator[Choice]:
    """The best member of each family."""
    yield from (replace(base, mmproj_on_gpu=False, load_mode=mode) for mode in _load_modes(facts, machine))
    groups = [machine.devices] if machine.devices else []
    if len(machine.devices) > 1:
        groups += [(device,) for device in machine.devices]
    caches = tuple(cache_bytes(layer.cache, base) for layer in facts.layers)
    whole, n_moe = facts.n_layer + 1, len(facts.moe_layers)
    for group in groups:
        fitted = _Fit(facts, group, base, caches, not machine.unified)
        families = [
            [(whole, 0)],
            [(whole, n) for n in range(n_moe, 0, -1)],
            [(n, n_moe) for n in range(1, whole) if n_moe],
            # Experts first: attention and the KV cache in RAM would cost more with every token of context.
            [(n, 0) for n in range(1, whole) if not n_moe],
        ]
        found = (_largest(fitted, family) for family in families)
        yield from (choice for choice in found if choice is not None)


def _load_modes(facts: ModelFacts, machine: Machine) -> tuple[LoadMode, ...]:
    return ("read", "mmap-plain") if facts.main_type in machine.repacked else ("mmap",)


def _largest(fitted: _Fit, family: Sequence[tuple[int, int]]) -> Choice | None:
    """The last member of a family that fits, by bisection: each takes more of the devices than the one before."""
    best, low, high = None, 0, len(family)
    while low < high:
        middle = (low + high) // 2
        if (found := fitted(*family[middle])) is not None:
            low, best = middle + 1, found
        else:
            high = middle
    return best


@dataclass(frozen=True)
class _Fit:
    """Deals layers out to ``group``; ``caches``: bytes of each layer's cache."""

    facts: ModelFacts
    group: tuple[Device, ...]
    base: Choice
    caches: tuple[int, ...]
    discrete: bool

    def __call__(self, n_gpu_layers: int, n_cpu_moe: int) -> Choice | None:
        """The choice with so much on the devices, or None where they have no room."""
        facts, first = self.facts, self.facts.n_layer + 1 - n_gpu_layers
        in_ram = facts.moe_layers[len(facts.moe_layers) - n_cpu_moe :] if n_cpu_moe else ()
        least = in_ram[0] if in_ram else facts.n_layer
        layers = zip(facts.layers[first:], self.caches[first:], range(first, facts.n_layer), strict=True)
        items = [
            layer.dense_bytes + cache + (layer.expert_bytes if number < least else 0) for layer, cache, number in layers
        ]
        copied = n_cpu_moe if in_ram and in_ram[-1] >= first else 0
        counts = _deal([*items, facts.output_bytes], self._rooms(copied, whole=first <= 0 and not copied))
        if counts is None:
            return None
        chosen = replace(self.base, n_gpu_layers=n_gpu_layers, n_cpu_moe=n_cpu_moe, layers_of=tuple(counts))
        return replace(chosen, devices=tuple(device.name for device in self.group))

    def _rooms(self, n_cpu_moe: int, *, whole: bool) -> list[int]:
        copied = offload_bytes(self.facts, n_cpu_moe) if self.discrete else 0
        fixed = compute_bytes(self.facts, self.base) + copied
        rooms = [_room(device) - fixed for device in self.group]
        if whole and len(rooms) > 1:
            rooms = [room - pipeline_bytes(self.facts, self.base, index) for index, room in enumerate(rooms)]
        rooms[0] -= mmproj_bytes(self.base.mmproj_bytes) if self.base.mmproj_on_gpu else 0
        return rooms


def _room(device: Device) -> int:
    return device.free_bytes - max(_MARGIN_BYTES, int(device.total_bytes * _MARGIN_SHARE))


def _deal(items: Sequence[int], rooms: Sequence[int]) -> list[int] | None:
    """How many of ``items``, in order, go to each device: in proportion to the rooms, else as many as fit each."""
    total, room = sum(items), sum(rooms)
    if min(rooms) < 0 or total > room:
        return None
    for limits in ([total * size // room + 1 for size in rooms], rooms):
        counts, rest = [0] * len(rooms), list(items)
        for index, (limit, size) in enumerate(zip(limits, rooms, strict=True)):
            last, used = index == len(rooms) - 1, 0
            while rest and used + rest[0] <= size and (last or used + rest[0] // 2 <= limit):
                used += rest.pop(0)
                counts[index] += 1
        if not rest:
            return counts
    return None


def _judge(
    machine: Machine, devices: Sequence[Device], books: Ledger, where: Residence, pageable: int
) -> tuple[Verdict, str, float]:
    """The verdict, its reason, and the part of the weights in RAM that RAM has no room for."""
    for index in sorted(where.used):
        if books.total(index) > devices[index].free_bytes:
            need, free = books.total(index) / GIB, devices[index].free_bytes / GIB
            return "no", f"{devices[index].name} needs {need:.1f} GiB and has {free:.1f} GiB", 0.0
    shared = sum(books.total(index) for index in where.used) if machine.unified else 0
    need, free = books.total(CPU) + shared, machine.ram_free_bytes
    lacking = max(need - free, 0)
    if lacking > pageable:
        return "no", f"needs {need / GIB:.1f} GiB of RAM, {free / GIB:.1f} GiB are free", 0.0
    if lacking:
        reason = f"RAM is {lacking / GIB:.1f} GiB too small for the weights"
        return "disk", reason, lacking / max(books.weights[CPU], 1)
    in_ram = CPU in where.layer_on or bool(where.experts_in_ram)
    return ("ram" if not where.used else "gpu+ram" if in_ram else "gpu"), "", 0.0
