"""How large a quant of a model may be for a machine to hold it at a context: a size for `make --fit`.

Takes the full-precision header, a machine and wishes, gives a :class:`Fit`. Every weight that llama-quantize would
quantize is taken to have the same bits: which bits go where is the allocation's business, within this size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dynrun.errors import DoesNotFitError
from dynrun.gguf.header import Header, padded
from dynrun.gguf.quantizable import quantizable
from dynrun.runtime.machine import Machine
from dynrun.runtime.model_facts import facts_of
from dynrun.runtime.placement import Placement, Verdict, Wishes
from dynrun.runtime.plan import plan

# More bits than Q8_0 has gain nothing; fewer than these no type has.
_MOST_BPW, _LEAST_BPW = 8.5, 1.75
# Below this a smaller model is better: then some of a finer quant goes into RAM instead.
_DECENT_BPW = 2.5
_PRECISION = 0.005


@dataclass(frozen=True)
class Fit:
    """``bpw`` of the quantized weights; ``size_bytes`` of the whole file, metadata included."""

    size_bytes: int
    bpw: float
    placement: Placement


def fit(header: Header, machine: Machine, wishes: Wishes) -> Fit:
    """The largest quant up to the size of Q8_0 that lies on the devices whole; where that would be under 2.5 bits per
    weight, or there are none, the largest that devices and RAM hold together without reading from the disk.

    Raises DoesNotFitError where the machine is too small for any.
    """
    whole = _largest(header, machine, wishes, ("gpu",)) if machine.devices else None
    if whole is not None and whole.bpw >= _DECENT_BPW:
        return whole
    shared = _largest(header, machine, wishes, ("gpu", "gpu+ram", "ram"))
    if shared is None:
        least = _sized(header, machine, wishes, _LEAST_BPW)
        raise DoesNotFitError(
            f"{machine.name} is too small for this model at {_LEAST_BPW} bits per weight: {least.placement.reason}",
            fix="choose a smaller model or context (--fit-ctx)",
        )
    return shared


def _largest(header: Header, machine: Machine, wishes: Wishes, verdicts: tuple[Verdict, ...]) -> Fit | None:
    """By bisection over bits per weight."""
    best, low, high = None, _LEAST_BPW, _MOST_BPW
    for bpw in (high, low):
        found = _sized(header, machine, wishes, bpw)
        if found.placement.verdict in verdicts:
            if bpw == high:
                return found
            best = found
    while best is not None and high - low > _PRECISION:
        middle = (low + high) / 2
        found = _sized(header, machine, wishes, middle)
        if found.placement.verdict in verdicts:
            low, best = middle, found
        else:
            high = middle
    return best


def _sized(header: Header, machine: Machine, wishes: Wishes, bpw: float) -> Fit:
    """The placement with all quantizable weights at ``bpw``."""
    chosen = quantizable(header)
    # For what a type does to speed: codebooks are slow on a CPU.
    kind = "IQ2_S" if bpw < 3 else "Q4_K"
    tensors = {
        name: replace(t, type=kind, nbytes=int(t.n_elements * bpw / 8)) if name in chosen else t
        for name, t in header.tensors.items()
    }
    size = header.data_offset + sum(padded(tensor.nbytes, header.alignment) for tensor in tensors.values())
    facts = facts_of(replace(header, tensors=tensors, file_bytes=size))
    return Fit(size, bpw, plan(facts, machine, wishes))
