"""Where each part of a model goes: what was chosen, and what follows from it.

The data that the planner (plan.py) gives and that run, serve, bench and the app read. Computes no bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dynrun.errors import UsageError
from dynrun.runtime.machine import Basis

# All in the memory of devices; devices and RAM; RAM alone; weights are read from the disk again and again; not at all.
Verdict = Literal["gpu", "gpu+ram", "ram", "disk", "no"]
LoadMode = Literal["mmap", "read", "mmap-plain"]


@dataclass(frozen=True)
class Wishes:
    """What the user wants; None leaves it to the planner.

    ``n_ctx``: tokens of context of one slot. ``parallel``: slots. ``type_k``, ``type_v``: KV cache types as llama.cpp
    spells them. ``mmproj``: the file of the image encoder, of ``mmproj_bytes``. ``prompt_cache_bytes``: host memory for
    the KV of earlier conversations (llama-server's --cache-ram).
    """

    n_ctx: int | None = None
    parallel: int = 1
    type_k: str = "f16"
    type_v: str = "f16"
    mmproj: Path | None = None
    mmproj_bytes: int = 0
    prompt_cache_bytes: int | None = None


@dataclass(frozen=True)
class Choice:
    """What is told to llama-server; this alone is remembered of a placement that worked.

    ``n_ctx``: of one slot. ``n_gpu_layers`` as of -ngl: the last so many layers, the output counted as one more.
    ``n_cpu_moe``: of the last so many layers that have experts, the experts stay in RAM. ``layers_of``: how many of
    these layers each of ``devices`` holds, in their order. ``prompt_cache_mib``: --cache-ram. ``load_mode``: the file
    is mapped; or read into memory, where the CPU wants its weights in another order anyway; or mapped and kept in the
    file's order, to read it from the disk again and again.
    """

    n_ctx: int
    parallel: int = 1
    type_k: str = "f16"
    type_v: str = "f16"
    n_gpu_layers: int = 0
    n_cpu_moe: int = 0
    layers_of: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()
    mmproj: Path | None = None
    mmproj_bytes: int = 0
    mmproj_on_gpu: bool = True
    prompt_cache_mib: int = 0
    load_mode: LoadMode = "mmap"

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a file."""
        lists = {"layers_of": list(self.layers_of), "devices": list(self.devices)}
        return {**vars(self), **lists, "mmproj": str(self.mmproj) if self.mmproj else None}


def choice_from_json(data: Mapping[str, Any]) -> Choice:
    """Of :meth:`Choice.to_json`. Raises UsageError for anything else."""
    try:
        made = Choice(**data)
        mmproj = Path(made.mmproj) if made.mmproj else None
        tuples = {"layers_of": tuple(map(int, made.layers_of)), "devices": tuple(map(str, made.devices))}
        return Choice(**{**vars(made), **tuples, "mmproj": mmproj})
    except (TypeError, ValueError) as error:
        raise UsageError(f"this is no remembered placement: {error}", fix="delete it; it is planned anew") from error


@dataclass(frozen=True)
class Placement:
    """A choice for one model on one machine, and what follows.

    ``device_bytes``: of each device, and of ``CPU`` what lies in RAM, mapped weights counted; ``host_bytes`` is the
    latter; ``kv_bytes``: KV cache and recurrent state on all of them; ``overrides``: pairs of tensor pattern and
    buffer, as of -ot; ``argv``: llama-server's options for all this, without the program, the model, and where it
    listens. ``basis`` of ``tokens_per_second``, which is for one slot with 4096 tokens in the context, or half
    of it where that is less; ``bytes_per_token``: what it
    then reads. ``pageable_bytes``: of ``host_bytes`` what the system may drop and read again, weights in a mapped file.
    ``reason``: why it does
    not fit, or reads from the disk. ``merit``: tokens per second that placements are compared by (speed.py).
    """

    choice: Choice
    verdict: Verdict
    weight_bytes: int
    device_bytes: Mapping[str, int]
    pageable_bytes: int
    kv_bytes: int
    compute_bytes: int
    overrides: tuple[tuple[str, str], ...]
    tokens_per_second: float
    bytes_per_token: int
    basis: Basis
    argv: tuple[str, ...]
    reason: str = ""
    merit: float = 0.0

    @property
    def host_bytes(self) -> int:
        return self.device_bytes.get("CPU", 0)

    @property
    def fits(self) -> bool:
        return self.verdict != "no"
