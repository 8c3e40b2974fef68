"""Broken and hostile files of every kind, by fixed seeds; benchmarks/fuzz.py looks further, and for longer."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz_targets import NEVER_REFUSE, TARGETS, seeds, tried

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


_NPY = b"\x93NUMPY\x01\x00"
_REPOSITORY = b'{"id": "owner/name", "sha": "%s", "siblings": []}\n%%%%\n' % (b"a" * 40)
_SHARDS = b",".join(
    b'{"type": "file", "path": "m%d-00001-of-99999.gguf", "size": 1, "oid": "%s"}' % (i, b"a" * 40) for i in range(500)
)
# What once ended in a traceback, took too long or was believed: by target.
_FOUND = [
    ("kld-cache", _NPY + b"\x10\x00{'descr': (\x00    \n"),  # SyntaxError
    ("kld-cache", _NPY + b"\x10\x00{'descr': ((((((\n"),  # tokenize.TokenError
    ("kld-manifest", b'{"files": {}, "inputs": [1], "result": {}}'),  # TypeError, KeyError
    ("kld-manifest", b"[]"),  # TypeError
    ("kld-manifest", b'{"inputs": {"reference": "%s"}}' % (b"0" * 64)),  # TypeError: no commit to be told
    ("reply", b"data: 7\n\n"),  # TypeError
    ("reply", b'data: {"choices": [{"delta": {"content": 7}, "finish_reason": "stop"}]}\n\n'),  # TypeError at the end
    ("reply", b'data: {"choices": [{"delta": "x"}]}\n\n'),  # AttributeError
    ("reply", b'data: {"prompt_progress": {"total": 1}}\n\n'),  # KeyError
    ("reply", b'data: {"timings": {"prompt_n": Infinity}}\n\n'),  # OverflowError
    ("reply", b"data: " + b"[" * 50_000 + b"\n\n"),  # RecursionError
    ("generated", b"[]"),  # TypeError
    ("generated", b'{"choices": [], "usage": {}}'),  # IndexError
    ("generated", b"no JSON"),  # JSONDecodeError
    ("hub-repository", b"[]"),  # TypeError of huggingface_hub
    ("hub-repository", b"{}"),  # KeyError of huggingface_hub
    ("hub-repository", _REPOSITORY + b'[{"type": "file", "path": 7, "size": 1, "oid": "x"}]'),  # TypeError
    ("hub-repository", _REPOSITORY + b'[{"type": "file", "path": "m.gguf", "size": -1, "oid": "%s"}]' % (b"a" * 40)),
    ("hub-search", b'[{"id": "\x1b[2J"}, 7]'),  # TypeError of huggingface_hub
    ("hub-search", b'[{"id": "a/b", "downloads": []}, {"id": 7}]'),  # TypeError
]


@pytest.mark.parametrize(("name", "data"), _FOUND, ids=lambda value: value if isinstance(value, str) else "")
def test_what_was_found_once_is_refused(name: str, data: bytes, tmp_path: Path) -> None:
    assert not tried(name, data, tmp_path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        # A generator of answers goes on: half of a character is no character.
        ("reply", b'data: {"choices": [{"delta": {"content": "\\ud800"}, "finish_reason": "stop"}]}\n\n'),
        ("health", b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nConnection: close\r\n\r\nno gzip"),
        ("served", b'{"started_s": 0, "url": "http://[", "key_file": "/k", "models": 7}'),
        ("served", b"[" * 50_000),
        ("hub-waits", "²".encode("latin-1")),
        ("hub-repository", _REPOSITORY + b"[" + _SHARDS + b"]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_was_found_once_is_taken(name: str, data: bytes, tmp_path: Path) -> None:
    began = time.monotonic()
    assert tried(name, data, tmp_path)
    assert time.monotonic() - began < 5


# What has seeds that are refused too: shards without the others, refusals of servers.
_REFUSED = frozenset({"shards", "kld-manifest", "reply", "hub-repository", "hub-range", "hub-pull"})


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_good_files(name: str, tmp_path: Path) -> None:
    taken = [tried(name, data, tmp_path) for data in seeds(name, tmp_path)]
    assert all(taken) or name in _REFUSED
    assert any(taken) or name == "shards"


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_is_in_a_file_ends_in_an_error_for_people(name: str, tmp_path: Path) -> None:
    good = seeds(name, tmp_path)
    outcomes = set()

    @settings(max_examples=60, derandomize=True, deadline=5000, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(good) - 1), _EDITS)
    def check(which: int, edits: list[tuple[int, str, bytes]]) -> None:
        outcomes.add(tried(name, edited(good[which], edits), tmp_path))

    check()
    assert (False in outcomes) == (name not in NEVER_REFUSE), "no edit broke anything"
