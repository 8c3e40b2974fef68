"""The file of a pass's sums: what a resumed run takes from it, and that it never has all of it beside its own."""

from __future__ import annotations

import tracemalloc
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dynrun.calibration.collect import Checkpoint, SquareSums

N, N_VALUES = 8, 1 << 17


class Passing:
    """Has ``N`` arrays, keeps none of those that it is given."""

    inputs: Collection[str] = ()

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def take(self, activation: object) -> None:
        raise AssertionError

    def begin(self, batch: int) -> None:
        raise AssertionError

    def state(self) -> Mapping[str, npt.NDArray[Any]]:
        return {f"a{i}": np.full(N_VALUES, i, dtype=np.float64) for i in range(N)}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        for name in state:
            self.seen[name] = float(state[name].mean())


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "state.npz"
    Checkpoint(path, every_s=-1.0).save_if_due(16, [Passing(), SquareSums({}, {"w": np.ones((1, 4))})])
    return path


def test_its_arrays_are_there_one_at_a_time(written: Path) -> None:
    passing, sums = Passing(), SquareSums({"w": 1})
    tracemalloc.start()
    try:
        assert Checkpoint(written).load([passing, sums]) == 16
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert passing.seen == {f"a{i}": float(i) for i in range(N)}
    assert sums.sums["w"].tolist() == [[1, 1, 1, 1]]
    assert peak < 3 * N_VALUES * 8


def test_of_a_damaged_one_nothing_is_taken(written: Path) -> None:
    data = bytearray(written.read_bytes())
    # In the last of the large arrays.
    data[7 * N_VALUES * 8 + 1000] ^= 1
    written.write_bytes(data)
    passing = Passing()
    assert Checkpoint(written).load([passing, SquareSums({"w": 1})]) == 0
    assert passing.seen == {}


def test_one_of_other_sums_is_none(written: Path) -> None:
    passing = Passing()
    assert Checkpoint(written).load([passing]) == 0
    assert passing.seen == {}
