"""What a user can choose from under one name: the quants of a repository, or the files here, each with its placement.

Takes MODEL, a machine and wishes, gives :class:`Offer` by offer; downloads headers only. Recommends one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dynrun.demo.builtin import BUILTIN
from dynrun.errors import DynrunError, NetworkError
from dynrun.gguf.quant_label import label_of
from dynrun.gguf.shards import read_whole_header
from dynrun.hub.cache import cache_folder
from dynrun.hub.errors import RefusedError
from dynrun.hub.files import Variant
from dynrun.hub.headers import HeaderReader
from dynrun.hub.local import local_models
from dynrun.hub.resolve import Ask, Found, find, parse_name
from dynrun.hub.variants import MMPROJ, best_companion, choose
from dynrun.models import list_models, made_path, resolve
from dynrun.runtime.machine import Machine
from dynrun.runtime.model_facts import ModelFacts, facts_of
from dynrun.runtime.placement import Placement, Wishes
from dynrun.runtime.plan import plan

# Slower than people read, nothing is recommended for its quality.
_PLEASANT_TOKENS_PER_S = 8.0


@dataclass(frozen=True)
class Offer:
    """A quant and where it would go. ``file``: what llama-server is given, a path here, or in the repository;
    ``download_bytes``: 0 where it is here. ``fault``: why it cannot be planned; the rest is empty then."""

    label: str
    file: str
    size_bytes: int
    download_bytes: int
    facts: ModelFacts | None = None
    placement: Placement | None = None
    fault: str = ""


def is_local(model: str) -> bool:
    """Whether MODEL is a file or folder of this machine, or a model that dynrun brings or made."""
    name, _, label = model.partition(":")
    return Path(model).expanduser().exists() or name in BUILTIN or bool(label and made_path(name, label).is_file())


def local_offers(model: str, machine: Machine, wishes: Wishes) -> Iterator[Offer]:
    """The file that MODEL means; of a built-in name also all that were made of it."""
    paths = [resolve(model).path]
    if model in BUILTIN:
        paths += [listed.path for listed in list_models() if listed.name.startswith(f"{model}:")]
    for path in paths:
        header = read_whole_header(path)
        facts = facts_of(header)
        yield Offer(label_of(header), str(path), header.file_bytes, 0, facts, plan(facts, machine, wishes))


def find_on_hub(model: str, quant: str, ask: Ask) -> Found:
    """The repository that MODEL means. Raises what hub/resolve.py raises."""
    return find(parse_name(model, quant), ask)


def hub_offers(found: Found, machine: Machine, wishes: Wishes) -> Iterator[Offer]:
    """The quants of a repository, or the one that was named. Raises what hub/headers.py raises of the network."""
    read = HeaderReader()
    here = {local.name: local for local in local_models()}
    quants = found.shelf.quants
    if found.name.quant:
        quants = (choose(found.shelf, found.name.quant, found.repository.name),)
    for variant in quants:
        local = here.get(f"{found.repository.name}:{variant.label}")
        image = best_companion(found.shelf, MMPROJ, variant)
        wanted = wishes
        if wishes.mmproj is None and image is not None:
            wanted = replace(wishes, mmproj=Path(image.first.name), mmproj_bytes=image.size)
        file = str(local.path) if local else variant.first.path
        yield _offer(read, variant, file, 0 if local else variant.size, machine, wanted)


def _offer(
    read: HeaderReader, variant: Variant, file: str, download_bytes: int, machine: Machine, wishes: Wishes
) -> Offer:
    try:
        facts = replace(facts_of(read(variant)), label=variant.label)
    except DynrunError as error:
        # Of the network there is no use to go on; one file that is none is no reason to hide the others.
        if isinstance(error, NetworkError | RefusedError):
            raise
        return Offer(variant.label, file, variant.size, download_bytes, fault=error.message)
    return Offer(variant.label, file, variant.size, download_bytes, facts, plan(facts, machine, wishes))


def recommended(offers: Sequence[Offer]) -> Offer | None:
    """The largest that is fast enough to read along, all on devices before others; else the fastest; None where
    nothing runs without reading from the disk."""
    good = [(offer, offer.placement) for offer in offers if offer.placement and _good(offer.placement)]
    pleasant = [pair for pair in good if pair[1].tokens_per_second >= _PLEASANT_TOKENS_PER_S]
    for verdicts in (("gpu",), ("gpu+ram", "ram")):
        if chosen := [pair for pair in pleasant if pair[1].verdict in verdicts]:
            return max(chosen, key=lambda pair: pair[0].size_bytes)[0]
    return max(good, key=lambda pair: pair[1].tokens_per_second)[0] if good else None


def _good(placement: Placement) -> bool:
    return placement.verdict not in ("no", "disk")


def free_disk_bytes() -> int:
    """Where downloads go."""
    folder = cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    return shutil.disk_usage(there).free
