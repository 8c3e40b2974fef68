"""The sensitivity stage: slopes and errors of every quantizable tensor, on disk, resumable tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrun.artifacts import Outcome, StageFolder, run_stage, stage_folder, write_json
from dynrun.calibration.imatrix import Imatrix, read_imatrix
from dynrun.calibration.sequences import TokenSequence, fingerprint
from dynrun.calibration.stage import ImatrixStage
from dynrun.config import Config
from dynrun.gguf.header import TensorInfo
from dynrun.gguf.quantizable import candidate_types, is_mtp, quantizable
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.engine import Engine
from dynrun.models import Reference
from dynrun.sensitivity.errors import Quantizer
from dynrun.sensitivity.slopes import Slope
from dynrun.sensitivity.sweep import ProbeLog, Sweep, run_sweep
from dynrun.sensitivity.sweep import Progress as ProbeDone

TABLE_FILE = "sensitivity.json"
_PROBES_FILE = "probes.jsonl"
_ERRORS_FILE = "errors.jsonl"
_REVISION = 2


@dataclass(frozen=True)
class ProbeSettings:
    """Tokens of the probe split for the coarse and the fine type, in sequences of ``n_ctx``; rows sampled for the
    errors of types (of 1,024 columns; more of shorter ones)."""

    n_coarse_tokens: int = 1024
    n_fine_tokens: int = 512
    n_ctx: int = 128
    max_rows: int = 128


@dataclass(frozen=True)
class TensorSensitivity:
    """One tensor: its slope (None where nothing could be measured) and the error of each type it can have."""

    slope: Slope | None
    errors: Mapping[str, float]

    def price(self, type_name: str) -> float:
        """Predicted KLD (nats per token) of storing the tensor in ``type_name``."""
        error = self.errors[type_name]
        # Without a measurement the error alone must decide; it is small against any measured KLD.
        return self.slope.price(error) if self.slope else error


@dataclass(frozen=True)
class SensitivityStage:
    """The table of all tensors, the file it lies in, and the seconds that went into forward passes."""

    tensors: Mapping[str, TensorSensitivity]
    path: Path
    forward_s: float
    probe_s: float
    outcome: Outcome


def sensitivity_folder(
    reference: Reference,
    imatrix: ImatrixStage,
    parts: Sequence[TokenSequence],
    settings: ProbeSettings,
    menu: tuple[str, ...],
) -> StageFolder:
    """Where the table for these inputs lies, made or not."""
    inputs = {
        "reference": reference.sha256,
        "imatrix": imatrix.sha256,
        "sequences": fingerprint(parts),
        "settings": [settings.n_coarse_tokens, settings.n_fine_tokens, settings.n_ctx, settings.max_rows],
        "menu": list(menu),
        "revision": _REVISION,
        "llama_cpp": installation().commit,
    }
    return stage_folder("sensitivity", inputs)


def measure_sensitivity(
    reference: Reference,
    imatrix: ImatrixStage,
    parts: Sequence[TokenSequence],
    settings: ProbeSettings,
    menu: tuple[str, ...],
    *,
    config: Config,
    on_probe: Callable[[ProbeDone], None],
    on_error: Callable[[int, int], None],
) -> SensitivityStage:
    """Probe every quantizable tensor on ``parts`` and compute the error of every type on it, or find the table."""
    folder = sensitivity_folder(reference, imatrix, parts, settings, menu)

    def work(folder: StageFolder) -> Mapping[str, Any]:
        entries = read_imatrix(imatrix.path)
        quantizer = Quantizer(WeightFile(reference.path), entries, config.n_threads)
        errors = _all_errors(reference, quantizer, entries, settings, menu, folder / _ERRORS_FILE, on_error)
        log = ProbeLog(folder / _PROBES_FILE)
        slopes = _all_slopes(reference, quantizer, parts, settings, log, config, on_probe)
        table = {
            name: {"slope": [s.coarse, s.fine] if (s := slopes.get(name)) else None, "errors": errors[name]}
            for name in errors
        }
        write_json(folder / TABLE_FILE, table)
        probes = log.probes.values()
        return {"forward_s": sum(p.forward_s for p in probes), "probe_s": sum(p.elapsed_s for p in probes)}

    outcome = run_stage(folder, work)
    return SensitivityStage(read_table(folder / TABLE_FILE), folder / TABLE_FILE, **outcome.result, outcome=outcome)


def read_table(path: Path) -> dict[str, TensorSensitivity]:
    """The table that a sensitivity stage wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    table = {}
    for name, entry in data.items():
        points = entry["slope"]
        slope = Slope(coarse=tuple(points[0]), fine=tuple(points[1])) if points else None
        table[name] = TensorSensitivity(slope, entry["errors"])
    return table


def _all_slopes(
    reference: Reference,
    quantizer: Quantizer,
    parts: Sequence[TokenSequence],
    settings: ProbeSettings,
    log: ProbeLog,
    config: Config,
    on_probe: Callable[[ProbeDone], None],
) -> dict[str, Slope]:
    with Engine.open(
        reference.path, n_ctx=settings.n_ctx, n_threads=config.n_threads, n_gpu_layers=config.n_gpu_layers
    ) as engine:
        n_fine, tokens = 0, 0
        while n_fine < len(parts) and tokens < settings.n_fine_tokens:
            tokens += len(parts[n_fine].tokens)
            n_fine += 1
        # What no decode touches (MTP blocks) cannot be probed.
        shapes = {
            name: tensor.shape
            for name, tensor in quantizable(reference.header).items()
            if name in engine.weights and not is_mtp(name, reference.header.metadata)
        }
        sweep = Sweep(engine, quantizer, parts)
        return run_sweep(sweep, shapes, log, n_coarse=len(parts), n_fine=n_fine, progress=on_probe)


def _all_errors(
    reference: Reference,
    quantizer: Quantizer,
    imatrix: Imatrix,
    settings: ProbeSettings,
    menu: tuple[str, ...],
    path: Path,
    on_error: Callable[[int, int], None],
) -> dict[str, dict[str, float]]:
    tensors = quantizable(reference.header)
    found = _read_errors(path)
    with path.open("a", encoding="utf-8") as stream:
        for done, (name, tensor) in enumerate(tensors.items(), start=1):
            if name not in found:
                types = candidate_types(tensor, menu, imatrix.sums, reference.header.metadata)
                found[name] = _errors_of(quantizer, tensor, types, settings.max_rows)
                stream.write(json.dumps([name, found[name]]) + "\n")
                stream.flush()
            on_error(done, len(tensors))
    return {name: found[name] for name in tensors}


def _errors_of(quantizer: Quantizer, tensor: TensorInfo, types: list[str], max_rows: int) -> dict[str, float]:
    # Short rows give less per row: sample the same number of values from every tensor.
    rows = max(max_rows, max_rows * 1024 // tensor.shape[0])
    return quantizer.errors(tensor.name, types, rows)


def _read_errors(path: Path) -> dict[str, dict[str, float]]:
    """Whole lines only: the last one may be torn by a kill."""
    found: dict[str, dict[str, float]] = {}
    if not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            name, errors = json.loads(line)
        except (ValueError, TypeError):
            continue
        found[name] = errors
    path.write_text("".join(json.dumps([n, e]) + "\n" for n, e in found.items()), encoding="utf-8")
    return found
