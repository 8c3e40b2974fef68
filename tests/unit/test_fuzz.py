"""Broken and hostile files of every kind, by fixed seeds; benchmarks/fuzz.py looks further, and for longer."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz_targets import TARGETS, seeds, tried

# (where, in thousandths of the file; what is done there; with what)
_VALUES = st.one_of(
    st.sampled_from([b"", b"\0", b"\xff" * 4, b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b'"', b"]", b"{", b"\n"]),
    st.integers(0, 2**64 - 1).map(lambda value: struct.pack("<Q", value)),
    st.binary(max_size=12),
)
_EDITS = st.lists(
    st.tuples(st.integers(0, 999), st.sampled_from(["over", "insert", "cut", "end", "again"]), _VALUES),
    min_size=1,
    max_size=6,
)


def edited(data: bytes, edits: list[tuple[int, str, bytes]]) -> bytes:
    """``data`` after all edits; most of them near the beginning, where the headers are."""
    for where, what, value in edits:
        at = len(data) * where * where // 1_000_000
        if what == "over":
            data = data[:at] + value + data[at + len(value) :]
        elif what == "insert":
            data = data[:at] + value + data[at:]
        elif what == "cut":
            data = data[:at] + data[at + len(value) + 1 :]
        elif what == "end":
            data = data[: at + len(value)]
        else:
            data = data[:at] + data[at : at + 64] * 3 + data[at:]
    return data


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_good_files(name: str, tmp_path: Path) -> None:
    expected = name != "shards"
    assert all(tried(name, data, tmp_path) or not expected for data in seeds(name, tmp_path))


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_is_in_a_file_ends_in_an_error_for_people(name: str, tmp_path: Path) -> None:
    good = seeds(name, tmp_path)
    outcomes = set()

    @settings(max_examples=60, derandomize=True, deadline=5000, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(good) - 1), _EDITS)
    def check(which: int, edits: list[tuple[int, str, bytes]]) -> None:
        outcomes.add(tried(name, edited(good[which], edits), tmp_path))

    check()
    assert False in outcomes, "no edit broke anything"
