"""The sensitivity stage: slopes and errors of every quantizable tensor, on disk, resumable tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dynrun.artifacts import Outcome, StageFolder, append_line, read_lines, run_stage, stage_folder, write_json
from dynrun.calibration.imatrix import Imatrix, read_imatrix
from dynrun.calibration.sequences import TokenSequence, fingerprint
from dynrun.calibration.stage import ImatrixStage
from dynrun.config import Config
from dynrun.gguf.header import Header, TensorInfo
from dynrun.gguf.layout import tensor_bytes
from dynrun.gguf.quantizable import candidate_types, is_mtp, quantizable
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.engine import Engine
from dynrun.models import Reference
from dynrun.sensitivity.adaptive import Choices, Progress, Spent, spend
from dynrun.sensitivity.errors import Quantizer, TypeErrors
from dynrun.sensitivity.estimate import FIRST
from dynrun.sensitivity.kernels import activation_block, relative_costs
from dynrun.sensitivity.probe_log import ProbeLog, key_of
from dynrun.sensitivity.slopes import Slope
from dynrun.sensitivity.sweep import LocalProbes, Probes, Sweep
from dynrun.sensitivity.units import Unit, probe_types, units

TABLE_FILE = "sensitivity.json"
_PROBES_FILE = "probes.jsonl"
_ERRORS_FILE = "errors.jsonl"
_REVISION = 5


@dataclass(frozen=True)
class ProbeSettings:
    """At most ``n_tokens`` of the probe split for a tensor, in sequences of ``n_ctx``, until what the slopes'
    uncertainty is expected to cost is ``error`` of the predicted KLD; ``group``: units.py; ``n_rows``: rows sampled for
    the errors of types (of 1,024 columns; more of shorter ones); ``devices``: where probes run, here where it is empty.
    """

    n_tokens: int = 1024
    error: float = 0.01
    n_ctx: int = 128
    n_rows: int = 128
    group: str = ""
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorSensitivity:
    """One tensor: its slope (None where nothing could be measured), the error of each type it can have, Σ h·w², and the
    KLD (nats per token) that the activations' quantization costs, by its block (kernels.py)."""

    slope: Slope | None
    errors: Mapping[str, float]
    energy: float = 0.0
    kernel: Mapping[int, float] = field(default_factory=dict)

    def price(self, type_name: str) -> float:
        """Predicted KLD (nats per token) of storing the tensor in ``type_name``."""
        error = self.errors[type_name]
        # Without a measurement the error alone must decide; it is small against any measured KLD.
        return (self.slope.price(error) if self.slope else error) + self.unseen(type_name)

    def unseen(self, type_name: str) -> float:
        """The part of the price that weights put in place do not show."""
        return self.kernel.get(activation_block(type_name), 0.0)


@dataclass(frozen=True)
class SensitivityStage:
    """The table of all tensors, the file it lies in, and what it took: ``doubt`` is the expected loss from uncertain
    slopes, as a share of the predicted KLD; ``n_tokens`` were decoded in all probes; seconds in forward passes and in
    probes as a whole; ``error_spread``: 95% of the tensors know the errors of their types to this relative standard
    error, from sampling rows."""

    tensors: Mapping[str, TensorSensitivity]
    path: Path
    doubt: float
    n_tokens: int
    forward_s: float
    probe_s: float
    error_spread: float
    outcome: Outcome


def sensitivity_folder(
    reference: Reference,
    imatrix: ImatrixStage,
    parts: Sequence[TokenSequence],
    settings: ProbeSettings,
    menu: tuple[str, ...],
) -> StageFolder:
    """Where the table for these inputs lies, made or not."""
    how = asdict(settings)
    # Where it is measured changes no decision, but the last digits: the backend is in the key of neither.
    how.pop("devices")
    inputs = {
        "reference": reference.sha256,
        "imatrix": imatrix.sha256,
        "sequences": fingerprint(parts),
        "settings": how,
        "menu": list(menu),
        "revision": _REVISION,
        "llama_cpp": installation().commit,
        "on_cpu": installation().backend == "cpu",
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
    on_probe: Callable[[Progress], None],
    on_error: Callable[[int, int], None],
) -> SensitivityStage:
    """Probe every quantizable tensor on ``parts`` and compute the error of every type on it, or find the table."""
    folder = sensitivity_folder(reference, imatrix, parts, settings, menu)

    def work(folder: StageFolder) -> Mapping[str, Any]:
        entries = read_imatrix(imatrix.path)
        quantizer = Quantizer(WeightFile(reference.path), entries, config.n_threads)
        errors = all_errors(reference, quantizer, entries, settings, menu, folder / _ERRORS_FILE, on_error)
        log = ProbeLog(folder / _PROBES_FILE)
        candidates = {name: list(found.errors) for name, found in errors.items()}
        with _probes(reference, imatrix, quantizer, parts, candidates, settings, config) as opened:
            energy = {name: found.energy for name, found in errors.items()}
            probed = units({name: candidates[name] for name in opened.names}, settings.group, energy)
            choices = _choices(reference.header, errors, opened.names)
            spent = spend(
                *(probed, choices, log, opened.probes),
                n_sequences=len(parts),
                wanted=settings.error,
                progress=on_probe,
            )
        write_json(folder / TABLE_FILE, _table(spent, errors, _kernel_costs(opened.relative, probed, spent, log)))
        return {
            "doubt": spent.doubt,
            "n_tokens": spent.n_tokens,
            **log.seconds,
            "error_spread": spread_of_most(errors),
        }

    outcome = run_stage(folder, work)
    return SensitivityStage(read_table(folder / TABLE_FILE), folder / TABLE_FILE, **outcome.result, outcome=outcome)


def spread_of_most(errors: Mapping[str, TypeErrors]) -> float:
    """What 95% of the tensors keep below: the relative standard error of their types' errors."""
    # In a few tensors a single weight holds nearly all of Σ h·w²: what is left of them is sampled, and hardly counts.
    return float(np.quantile([found.spread for found in errors.values()], 0.95)) if errors else 0.0


def _kernel_costs(
    relative: Mapping[str, Mapping[int, float]], probed: Sequence[Unit], spent: Spent, log: ProbeLog
) -> dict[str, dict[int, float]]:
    """KLD from quantized activations: relative to that of the weight's finer probe."""
    found = {}
    for unit in probed:
        types = unit.types[min(1, len(unit.types) - 1)]
        for name, error in log.errors[key_of(unit.name, types)].items():
            kld = spent.slopes[name].price(error)
            found[name] = {block: kld * ratio for block, ratio in relative.get(name, {}).items()}
    return found


def _table(
    spent: Spent, errors: Mapping[str, TypeErrors], kernels: Mapping[str, Mapping[int, float]]
) -> dict[str, Any]:
    table = {}
    for name, found in errors.items():
        slope = spent.slopes.get(name)
        measured = {"points": slope.points, "spread": slope.spread} if slope else None
        table[name] = {"slope": measured, **asdict(found), "kernel": dict(kernels.get(name, {}))}
    return table


def read_table(path: Path) -> dict[str, TensorSensitivity]:
    """The table that a sensitivity stage wrote."""
    table = {}
    for name, entry in json.loads(path.read_text(encoding="utf-8")).items():
        measured = entry["slope"]
        points = tuple((error, kld) for error, kld in measured["points"]) if measured else ()
        slope = Slope(points, measured["spread"]) if measured else None
        kernel = {int(block): kld for block, kld in entry.get("kernel", {}).items()}
        table[name] = TensorSensitivity(slope, entry["errors"], entry["energy"], kernel)
    return table


def _choices(header: Header, errors: Mapping[str, TypeErrors], names: Sequence[str]) -> dict[str, Choices]:
    return {
        name: Choices(
            np.array(list(errors[name].errors.values())),
            np.array([float(tensor_bytes(header.tensors[name], t)) for t in errors[name].errors]),
        )
        for name in names
    }


@dataclass(frozen=True)
class _Opened:
    """What carries out the probes, the tensors that can be probed, and kernels.relative_costs of each."""

    probes: Probes
    names: list[str]
    relative: Mapping[str, Mapping[int, float]]


@contextmanager
def _probes(
    reference: Reference,
    imatrix: ImatrixStage,
    quantizer: Quantizer,
    parts: Sequence[TokenSequence],
    candidates: Mapping[str, Sequence[str]],
    settings: ProbeSettings,
    config: Config,
) -> Iterator[_Opened]:
    n_ctx, n_threads = settings.n_ctx, config.n_threads
    with Engine.open(reference.path, n_ctx=n_ctx, n_threads=n_threads, n_gpu_layers=config.n_gpu_layers) as engine:
        # What no decode touches (MTP blocks) cannot be probed.
        names = [n for n in candidates if n in engine.weights and not is_mtp(n, reference.header.metadata)]
        types = {name: own[min(1, len(own) - 1)] for name in names if (own := probe_types(candidates[name]))}
        # Only the CPU's kernels differ in this between types.
        on_cpu = installation().backend == "cpu"
        relative = relative_costs(engine, quantizer, parts[:FIRST], types) if on_cpu else {}
        if not settings.devices:
            yield _Opened(LocalProbes(Sweep(engine, quantizer, parts)), names, relative)
            return
    from dynrun.sensitivity.workers import ProbePool

    with ProbePool(
        reference.path, imatrix.path, parts, n_ctx=n_ctx, n_threads=n_threads, devices=settings.devices
    ) as pool:
        yield _Opened(pool, names, relative)


def all_errors(
    reference: Reference,
    quantizer: Quantizer,
    imatrix: Imatrix,
    settings: ProbeSettings,
    menu: tuple[str, ...],
    path: Path,
    on_error: Callable[[int, int], None],
) -> dict[str, TypeErrors]:
    """The errors of every type of the menu on every quantizable tensor; ``path`` holds those that are known already."""
    tensors = quantizable(reference.header)
    found = dict(read_lines(path, _parsed))
    for done, (name, tensor) in enumerate(tensors.items(), start=1):
        if name not in found:
            types = candidate_types(tensor, menu, imatrix.sums, reference.header.metadata)
            found[name] = _errors_of(quantizer, tensor, types, settings.n_rows)
            append_line(path, [name, asdict(found[name])])
        on_error(done, len(tensors))
    return {name: found[name] for name in tensors}


def _errors_of(quantizer: Quantizer, tensor: TensorInfo, types: list[str], n_rows: int) -> TypeErrors:
    # Short rows give less per row: sample the same number of values from every tensor.
    return quantizer.errors(tensor.name, types, max(n_rows, n_rows * 1024 // tensor.shape[0]))


def _parsed(line: Any) -> tuple[str, TypeErrors]:
    name, errors = line
    return name, TypeErrors(**errors)
