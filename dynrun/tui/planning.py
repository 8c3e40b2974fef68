"""What the Plan room computes, in worker threads: quants of a model with their facts, and placements of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dynrun.hub.cache import snapshot_path
from dynrun.hub.variants import matching
from dynrun.runtime.machine import Machine
from dynrun.runtime.model_facts import ModelFacts
from dynrun.runtime.placement import Choice, Placement, Wishes
from dynrun.runtime.plan import placed, plan
from dynrun.runtime.residence import CPU, Ledger, Residence, ledger, residence
from dynrun.tui.builtin import make_first
from dynrun.tui.messages import Frozen

if TYPE_CHECKING:
    from dynrun.hub.resolve import Found
    from dynrun.runtime.offers import Offer

KV_TYPES = ("f16", "q8_0", "q5_1", "q4_0")
VERDICTS = {
    "gpu": "all on GPU",
    "gpu+ram": "GPU + RAM",
    "ram": "in RAM",
    "disk": "pages from disk",
    "no": "does not fit",
}


@dataclass(frozen=True)
class Quant:
    """One quant of what is planned. ``model``: MODEL as commands take it; ``path``: its file, None before download.
    ``facts`` are None while its header is being read, or where that failed, as ``error`` says."""

    model: str
    label: str
    size_bytes: int
    path: Path | None
    facts: ModelFacts | None = None
    placement: Placement | None = None
    error: str = ""


@dataclass(frozen=True)
class Knobs:
    """What the user has set; None is left to the planner."""

    n_ctx: int | None = None
    type_kv: str = "f16"
    n_gpu_layers: int | None = None
    n_cpu_moe: int | None = None

    @property
    def manual(self) -> bool:
        return self.n_gpu_layers is not None or self.n_cpu_moe is not None


@dataclass(frozen=True)
class Shown:
    """A placement with all that pictures of it need."""

    placement: Placement
    residence: Residence
    ledger: Ledger
    machine: Machine
    facts: ModelFacts


@dataclass(eq=False)
class QuantsFound(Frozen):
    """The quants of ``title``, their headers not read yet."""

    title: str
    quants: tuple[Quant, ...]
    note: str = ""


@dataclass(eq=False)
class QuantRecommended(Frozen):
    """Of all of them the one in row ``index`` is the best for this machine."""

    index: int


@dataclass(eq=False)
class QuantPlanned(Frozen):
    """The quant in row ``index`` with its facts and its placement, or with what went wrong."""

    index: int
    quant: Quant


def open_model(model: str, path: Path | None, tell: Callable[[Frozen], None], machine: Machine) -> None:
    """Tell the quants of ``model``, then each with facts and placement. Raises DynrunError where it is nothing."""
    from dynrun.runtime.offers import hub_offers, is_local, local_offers, recommended

    note, quants = "", list[Quant]()
    if path is not None and path.is_file():
        title, offers = model or path.stem, local_offers(str(path), machine, Wishes())
    elif is_local(model):
        make_first(model)
        title, offers = model, local_offers(model, machine, Wishes())
    else:
        found, quants = _on_hub(model)
        title, note, offers = found.repository.name, found.note, hub_offers(found, machine, Wishes())
    tell(QuantsFound(title, tuple(quants), note))
    known = []
    for index, offer in enumerate(offers):
        name = quants[index].model if index < len(quants) else title if index == 0 else offer.file
        tell(QuantPlanned(index, _quant(name, offer)))
        known.append(offer)
    if len(known) > 1 and (best := recommended(known)) is not None:
        tell(QuantRecommended(known.index(best)))


def _quant(model: str, offer: Offer) -> Quant:
    path = None if offer.download_bytes else Path(offer.file)
    return Quant(model, offer.label, offer.size_bytes, path, offer.facts, offer.placement, offer.fault)


def _on_hub(model: str) -> tuple[Found, list[Quant]]:
    """The repository, and its quants while their headers are not read yet."""
    from dynrun.tui.pulling import name_of, open_repository

    found, here = open_repository(model)
    wanted = matching(found.shelf, found.name.quant)
    quants = []
    for variant in wanted:
        path = snapshot_path(variant.first) if all(file.path in here for file in variant.files) else None
        quants.append(Quant(name_of(found, variant), variant.label, variant.size, path))
    return found, quants


def placement_of(facts: ModelFacts, machine: Machine, knobs: Knobs) -> Shown:
    """What the knobs mean; fast enough to follow a slider. Raises UsageError for a wish that makes no sense."""
    placement = plan(facts, machine, Wishes(n_ctx=knobs.n_ctx, type_k=knobs.type_kv, type_v=knobs.type_kv))
    if knobs.manual:
        placement = placed(facts, machine, _by_hand(facts, machine, placement.choice, knobs))
    where = residence(facts, placement.choice)
    books = ledger(facts, placement.choice, where, discrete=not machine.unified)
    return Shown(placement, where, books, machine, facts)


def _by_hand(facts: ModelFacts, machine: Machine, choice: Choice, knobs: Knobs) -> Choice:
    n_gpu_layers = choice.n_gpu_layers if knobs.n_gpu_layers is None else knobs.n_gpu_layers
    n_cpu_moe = choice.n_cpu_moe if knobs.n_cpu_moe is None else knobs.n_cpu_moe
    devices = choice.devices or tuple(device.name for device in machine.devices)
    return replace(
        choice,
        n_gpu_layers=n_gpu_layers,
        n_cpu_moe=min(n_cpu_moe, len(facts.moe_layers)),
        devices=devices if n_gpu_layers else (),
        layers_of=_dealt(n_gpu_layers, [device.free_bytes for device in machine.named(devices)]),
    )


def _dealt(n_layers: int, rooms: list[int]) -> tuple[int, ...]:
    """So many layers for each device, in proportion to its room."""
    if not n_layers or not rooms:
        return ()
    total = sum(rooms) or 1
    counts: list[int] = []
    for index in range(len(rooms)):
        until = round(n_layers * sum(rooms[: index + 1]) / total)
        counts.append(until - sum(counts))
    return tuple(counts)


def contexts(n_ctx_train: int) -> list[int]:
    """Contexts to choose from: powers of two from 2048 up, and what the model was trained for."""
    trained = n_ctx_train or 32768
    return [*(n for n in (2048 << i for i in range(12)) if n < trained), trained]


def parts_of(books: Ledger, device: int) -> dict[str, int]:
    """The bytes of a device by kind."""
    named = {"weights": books.weights, "KV": books.caches, "compute": books.compute, "other": books.other}
    return {name: part.get(device, 0) for name, part in named.items()}


def rows_of(shown: Shown) -> list[tuple[str, int, int, int]]:
    """The memories of a placement: name, index in the ledger, bytes that are free, bytes that there are."""
    devices = shown.machine.named(shown.placement.choice.devices)
    rows = [(device.name, index, device.free_bytes, device.total_bytes) for index, device in enumerate(devices)]
    return [*rows, ("RAM", CPU, shown.machine.ram_free_bytes, shown.machine.ram_bytes)]
