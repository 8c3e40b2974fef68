"""A sensitivity table made up for a model, for tests of what is chosen by one."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynrun.artifacts import Outcome, sha256_file
from dynrun.calibration.imatrix import Imatrix, write_imatrix
from dynrun.calibration.stage import ImatrixStage
from dynrun.gguf.header import read_header
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.models import Reference

K_MENU = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


@dataclass(frozen=True)
class Row:
    """A tensor whose KLD grows linearly with the error."""

    errors: Mapping[str, float]
    slope: float

    def price(self, type_name: str) -> float:
        return self.slope * self.errors[type_name]


def table_of(reference: Reference, types: Iterable[str] = K_MENU) -> dict[str, Row]:
    """Errors as of a uniform quantizer, slopes that differ by name; always the same."""
    errors = {name: 4.0 ** -TENSOR_TYPES[name].bpw for name in types}
    return {
        name: Row(errors, (zlib.crc32(name.encode()) % 100 + 1) * tensor.n_elements / 1e5)
        for name, tensor in quantizable(reference.header).items()
    }


def reference_of(path: Path) -> Reference:
    return Reference(path.stem, read_header(path), sha256_file(path))


def stage_of(folder: Path) -> ImatrixStage:
    """An imatrix that knows one weight."""
    name = "blk.0.attn_q.weight"
    imatrix = Imatrix({name: np.ones((1, 256))}, {name: np.ones(1)}, ("made up",))
    write_imatrix(imatrix, path := folder / "imatrix.gguf")
    return ImatrixStage(
        path, sha256_file(path), "made up", 64, 1, "", (), 0, 0, 0, 0.0, Outcome("imatrix", {}, 0.0, cached=True)
    )
