"""A bench as it is kept and printed: its rows, how the machine drifted, and which machine it was."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from dynrun.errors import DynrunError
from dynrun.llamacpp.build import installation
from dynrun.runtime.bench import Bench, Setup
from dynrun.runtime.machine import Machine
from dynrun.runtime.opening import Where, planner_for


def result_of(found: Bench, machine: Machine) -> dict[str, Any]:
    """What `dynrun bench --json` prints and bench_history.py keeps."""
    built = installation()
    described = {
        "name": machine.name,
        "cores": machine.cores,
        "ram_bytes": machine.ram_bytes,
        "ram_bytes_per_s": machine.ram_bytes_per_s,
        "bandwidths": machine.basis,
        "devices": [{"name": d.name, "description": d.description, "bytes": d.total_bytes} for d in machine.devices],
        "backend": built.backend,
        "llama_cpp": built.commit,
    }
    drift = None if found.drift is None else {**asdict(found.drift), "throttled": found.drifted}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "rows": [asdict(row) for row in found.rows],
        "drift": drift,
        "machine": described,
        "elapsed_s": found.elapsed_s,
    }


def learn_from(setups: Sequence[Setup], found: Bench) -> None:
    """Let the planner learn what its own placements reach."""
    for row in found.rows:
        setup = next(s for s in setups if (s.name, s.placement) == (row.model, row.placement))
        if setup.planned is not None and row.test.startswith("tg") and not row.noisy:
            # What cannot be kept does not matter to a bench; the devices of RPC servers are nobody's to predict.
            with suppress(DynrunError, OSError):
                planner_for(setup.model, Where()).learn(setup.planned, row.tokens_per_second)
