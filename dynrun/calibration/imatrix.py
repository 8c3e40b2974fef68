"""The importance matrix: Σx² per input column of every weight, collected by the engine, in llama.cpp's GGUF format.

Format as tools/imatrix/imatrix.cpp writes it: F32 tensors ``<weight>.in_sum2`` [ne0, n_expert], raw sums, and
``<weight>.counts`` [1, n_expert], the number of inputs summed. An expert that saw nothing is stored as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, GGUFWriter

from dynrun.artifacts import atomic_path
from dynrun.errors import DynrunError
from dynrun.llamacpp.engine import Engine
from dynrun.llamacpp.graph import Activation

Sums = npt.NDArray[np.float64]
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Imatrix:
    """``sums[weight]`` [n_expert, ne0], ``counts[weight]`` [n_expert]; n_expert is 1 for dense weights."""

    sums: Mapping[str, Sums]
    counts: Mapping[str, Sums]

    def mean(self, weight: str) -> Sums | None:
        """Mean of x² per input column, [n_expert, ne0]; None where the weight has no entry.

        Experts that saw nothing get ones, as llama-quantize gives them.
        """
        if weight not in self.sums:
            return None
        counts = self.counts[weight][:, None]
        return np.where(counts > 0, self.sums[weight] / np.maximum(counts, 1), 1.0)


@dataclass
class Collector:
    """Sums up activations; give :meth:`take` to the engine's hook."""

    n_expert: Mapping[str, int]
    sums: dict[str, Sums] = field(default_factory=dict)
    counts: dict[str, Sums] = field(default_factory=dict)

    def take(self, activation: Activation) -> None:
        """Add the squares of one input."""
        name, width = activation.weight, activation.x.shape[-1]
        if name not in self.sums:
            experts = self.n_expert.get(name, 1)
            self.sums[name], self.counts[name] = np.zeros((experts, width)), np.zeros(experts)
        if activation.experts is None:
            # Float32 sums of one batch are accurate to 1e-6; the batches are summed in float64.
            self.sums[name][0] += np.einsum("ij,ij->j", activation.x, activation.x)
            self.counts[name][0] += len(activation.x)
            return
        for expert in np.unique(activation.experts):
            rows = activation.x[activation.experts == expert]
            self.sums[name][expert] += np.einsum("ij,ij->j", rows, rows)
            self.counts[name][expert] += len(rows)

    def result(self) -> Imatrix:
        """What was collected."""
        return Imatrix(self.sums, self.counts)


def collect(
    engine: Engine, sequences: Sequence[Sequence[int]], progress: Callable[[int], None] = lambda _: None
) -> Imatrix:
    """Decode each sequence on its own and sum up; ``progress`` gets the number of tokens done."""
    experts = {name: weight.shape[2] for name, weight in engine.weights.items() if len(weight.shape) > 2}
    collector = Collector(experts)
    done = 0
    for tokens in sequences:
        engine.watch_inputs(tokens, collector.take)
        done += len(tokens)
        progress(done)
    for name, sums in collector.sums.items():
        if not np.isfinite(sums).all():
            raise DynrunError(f"the activations of {name} in {engine.path} are not finite", fix="the model is damaged")
    return collector.result()


def write_imatrix(imatrix: Imatrix, path: Path, *, dataset: str, chunk_count: int, chunk_size: int) -> None:
    """Write ``path`` atomically; ``chunk_count`` sequences of up to ``chunk_size`` tokens from ``dataset``."""
    with atomic_path(path) as temporary:
        writer = GGUFWriter(str(temporary), "")
        # The writer names an architecture; an imatrix has none.
        writer.kv_data[0].pop("general.architecture", None)
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [dataset])
        writer.add_uint32("imatrix.chunk_count", chunk_count)
        writer.add_uint32("imatrix.chunk_size", chunk_size)
        for name in sorted(imatrix.sums):
            writer.add_tensor(name + _SUMS, imatrix.sums[name].astype(np.float32))
            writer.add_tensor(name + _COUNTS, imatrix.counts[name].astype(np.float32)[:, None])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_imatrix(path: Path) -> Imatrix:
    """Read an imatrix in GGUF format, ours or llama-imatrix's. Raises DynrunError for anything else."""
    try:
        reader = GGUFReader(str(path))
        kind = reader.fields["general.type"].contents()
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise DynrunError(f"{path} is no imatrix in GGUF format", fix="make one with `dynrun imatrix`") from error
    if kind != "imatrix":
        raise DynrunError(f"{path} is a GGUF of type {kind!r}, no imatrix", fix="make one with `dynrun imatrix`")
    arrays = {tensor.name: np.array(tensor.data, dtype=np.float64) for tensor in reader.tensors}
    names = [name.removesuffix(_SUMS) for name in arrays if name.endswith(_SUMS)]
    sums = {name: np.atleast_2d(arrays[name + _SUMS]) for name in names}
    return Imatrix(sums, {name: arrays[name + _COUNTS].reshape(-1) for name in names})
