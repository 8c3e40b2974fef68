"""`dynrun plan`: what fits where, before loading or downloading."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options
from dynrun.cli.output import emit, say

if TYPE_CHECKING:
    from dynrun.runtime.machine import Machine
    from dynrun.runtime.offers import Offer
    from dynrun.runtime.placement import Placement, Wishes

_VERDICTS = {
    "gpu": "all on the GPU",
    "gpu+ram": "GPU and RAM",
    "ram": "in RAM",
    "disk": "reads from the disk",
    "no": "does not fit",
}
_GIB = 1 << 30


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A GGUF, a name that `dynrun ls` shows, or owner/repo[:QUANT].")
    ],
    quant: Annotated[str, typer.Option("--quant", help="Only this quant of the repository.")] = "",
    ctx: Annotated[
        int | None,
        typer.Option("--ctx", min=1, help="Tokens of context of each slot; default: the longest that is cheap."),
    ] = None,
    kv: Annotated[
        str, typer.Option("--kv", metavar="TYPE", help="Type of the KV cache: f16, q8_0, …; K,V for two of them.")
    ] = "f16",
    parallel: Annotated[int, typer.Option("--parallel", min=1, max=64, help="Slots: requests answered at once.")] = 1,
    mmproj: Annotated[
        Path | None, typer.Option("--mmproj", metavar="FILE", help="An image encoder; one in the repository is found.")
    ] = None,
    prompt_cache: Annotated[
        str | None, typer.Option("--prompt-cache", metavar="SIZE", help="RAM for the KV of earlier conversations.")
    ] = None,
    machine: Annotated[
        Path | None,
        typer.Option("--machine", metavar="FILE", help="Plan for the machine in this TOML, not for this one."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """What fits where, before loading or downloading: of each quant the verdict, memory, predicted speed.

    Reads headers only, remote ones by ranges. Example: dynrun plan unsloth/gemma-3-27b-it-GGUF --ctx 32768
    """
    from dynrun.runtime.machine import read_machine
    from dynrun.runtime.this_machine import this_machine

    wishes = _wishes(ctx, kv, parallel, mmproj, prompt_cache)
    target = read_machine(machine) if machine else this_machine()
    name, offers = _offers(model, quant, target, wishes)
    data = _to_json(name, target, offers)
    emit(as_json, data, lambda: _show(name, target, offers))
    if not any(offer.placement and offer.placement.fits for offer in offers):
        raise typer.Exit(5)


def _wishes(ctx: int | None, kv: str, parallel: int, mmproj: Path | None, prompt_cache: str | None) -> Wishes:
    from dynrun.errors import NotFoundError, UsageError
    from dynrun.runtime.placement import Wishes

    types = [name.strip().lower() for name in kv.split(",")]
    if len(types) > 2:
        raise UsageError(f"--kv {kv} names more than two types", fix="one for both, or K and V as in q8_0,f16")
    if mmproj is not None and not mmproj.is_file():
        raise NotFoundError(f"{mmproj} does not exist", fix="check the path of --mmproj")
    return Wishes(
        n_ctx=ctx,
        parallel=parallel,
        type_k=types[0],
        type_v=types[-1],
        mmproj=mmproj,
        mmproj_bytes=mmproj.stat().st_size if mmproj else 0,
        prompt_cache_bytes=options.size_bytes(prompt_cache) if prompt_cache else None,
    )


def _offers(model: str, quant: str, machine: Machine, wishes: Wishes) -> tuple[str, list[Offer]]:
    """What MODEL is called, and its quants."""
    from dynrun.cli.ask import ask_which
    from dynrun.runtime.offers import find_on_hub, hub_offers, is_local, local_offers

    if is_local(model):
        return model, list(local_offers(model, machine, wishes))
    found = find_on_hub(model, quant, ask_which)
    if found.note:
        say(found.note)
    name = found.repository.name
    say(f"reading headers of {name}")
    return name, list(hub_offers(found, machine, wishes))


def _to_json(name: str, machine: Machine, offers: Sequence[Offer]) -> dict[str, Any]:
    from dynrun.runtime.offers import free_disk_bytes, recommended

    best = recommended(offers)
    return {
        "model": name,
        "machine": asdict(machine),
        "disk_free_bytes": free_disk_bytes(),
        "recommended": best.label if best else None,
        "placements": [_row(offer) for offer in offers],
    }


def _row(offer: Offer) -> dict[str, Any]:
    from dynrun.runtime.command import command_line, layer_map

    row: dict[str, Any] = {
        "quant": offer.label,
        "file": offer.file,
        "size_bytes": offer.size_bytes,
        "download_bytes": offer.download_bytes,
        "fault": offer.fault or None,
    }
    if (found := offer.placement) is None or offer.facts is None:
        return {**row, "verdict": "no"}
    return {
        **row,
        "verdict": found.verdict,
        "reason": found.reason or None,
        "device_bytes": dict(found.device_bytes),
        "host_bytes": found.host_bytes,
        "pageable_bytes": found.pageable_bytes,
        "weight_bytes": found.weight_bytes,
        "kv_bytes": found.kv_bytes,
        "compute_bytes": found.compute_bytes,
        "tokens_per_second": found.tokens_per_second,
        "basis": {
            "weights": "measured",
            "kv": "measured" if offer.facts.exact else "estimated",
            "compute": "estimated",
            "speed": found.basis,
        },
        "choice": found.choice.to_json(),
        "map": layer_map(offer.facts, found.choice),
        "argv": list(found.argv),
        "command": list(command_line(found, offer.file)),
    }


def _show(name: str, machine: Machine, offers: Sequence[Offer]) -> None:
    from dynrun.runtime.offers import free_disk_bytes, recommended

    print(f"{name} on {_described(machine)}")
    print()
    _table(machine, offers)
    best = recommended(offers) if len(offers) > 1 else offers[0]
    if best is not None:
        _detail(best, free_disk_bytes())
    print(f"\nm measured, c calibrated, e estimated; bandwidths of this plan are {machine.basis}")


def _described(machine: Machine) -> str:
    parts = [
        f"{device.name} {device.free_bytes / _GIB:.1f} of {device.total_bytes / _GIB:.1f} GiB"
        for device in machine.devices
    ]
    parts.append(f"RAM {machine.ram_free_bytes / _GIB:.1f} of {machine.ram_bytes / _GIB:.1f} GiB")
    return f"{machine.name}: {', '.join(parts)} free"


def _table(machine: Machine, offers: Sequence[Offer]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("quant")
    table.add_column("verdict")
    names = [device.name for device in machine.devices]
    for heading in ("size m", *(f"{name} e" for name in names), "RAM e", "KV m", "ctx", "tok/s"):
        table.add_column(heading, justify="right")
    for offer in offers:
        table.add_row(*_cells(offer, names))
    Console(highlight=False, markup=False, width=None if _on_terminal() else 200).print(table)


def _on_terminal() -> bool:
    import sys

    return sys.stdout.isatty()


def _cells(offer: Offer, names: Sequence[str]) -> list[str]:
    from dynrun.report.text import visible

    label, size = visible(offer.label), f"{offer.size_bytes / _GIB:.1f}"
    if (found := offer.placement) is None:
        return [label, visible(offer.fault), size]
    memory = [f"{found.device_bytes.get(name, 0) / _GIB:.1f}" for name in (*names, "CPU")]
    speed = f"{found.tokens_per_second:.1f} {found.basis[0]}" if found.fits else ""
    kv = f"{found.kv_bytes / _GIB:.2f}{'' if offer.facts and offer.facts.exact else ' e'}"
    return [label, _VERDICTS[found.verdict], size, *memory, kv, f"{found.choice.n_ctx}", speed]


def _detail(offer: Offer, free_disk: int) -> None:
    from dynrun.report.text import visible
    from dynrun.runtime.command import command_line, layer_map

    if (found := offer.placement) is None or offer.facts is None:
        return
    print(f"\n{visible(offer.label)}: {_VERDICTS[found.verdict]}{f', {found.reason}' if found.reason else ''}")
    for line in layer_map(offer.facts, found.choice):
        print(f"  {line}")
    print(f"  {_memory(found)}")
    if offer.download_bytes:
        enough = "" if offer.download_bytes <= free_disk else ": too little"
        print(f"  disk: {offer.download_bytes / _GIB:.1f} GiB to download, {free_disk / _GIB:.1f} GiB are free{enough}")
    print(f"  $ {visible(shlex.join(command_line(found, offer.file)))}")


def _memory(found: Placement) -> str:
    parts = {
        "weights": f"{found.weight_bytes / _GIB:.2f} m",
        f"KV cache at {found.choice.n_ctx}": f"{found.kv_bytes / _GIB:.2f} m",
        "compute buffers": f"{found.compute_bytes / _GIB:.2f} e",
        "prompt cache at most": f"{found.choice.prompt_cache_mib / 1024:.2f}",
    }
    return "GiB: " + ", ".join(f"{name} {text}" for name, text in parts.items())
