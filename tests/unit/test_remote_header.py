"""Headers that are read by ranges: few bytes of large files, and bounded work for hostile ones."""

from __future__ import annotations

import struct
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrun.errors import DynrunError, NotFoundError
from dynrun.gguf.header import Header, parse_header, read_header
from dynrun.hub.files import RemoteFile, Variant
from dynrun.hub.headers import read_remote_header
from tests.tiny import write_tiny_llama
from tests.unit.test_header import ARRAY, STRING, U8, entry, info, model, text

GB = 1 << 30


class Remote:
    """A file of ``size`` bytes that begins with ``head``; zeros follow. Counts what is read of it."""

    def __init__(self, head: bytes, size: int) -> None:
        self.head, self.size = head, size
        self.n_bytes = self.n_requests = 0

    def __call__(self, offset: int, length: int) -> bytes:
        assert length > 0
        length = min(length, self.size - offset)
        self.n_bytes += length
        self.n_requests += 1
        found = self.head[offset : offset + length]
        return found + bytes(length - len(found))


def refused(remote: Remote) -> str:
    with pytest.raises(DynrunError) as caught:
        parse_header(Path("m.gguf"), remote, remote.size)
    return str(caught.value)


def test_it_is_the_header_of_the_same_file_here(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf")
    here = read_header(path)
    data = path.read_bytes()
    there = parse_header(path, Remote(data, len(data)), len(data))
    assert there == here
    assert there.tensors


def test_a_large_file_is_read_in_a_few_requests() -> None:
    words = b"".join(text(f"token{number:030}") for number in range(200_000))
    infos = (info("a", (256, 1 << 24), 12),)
    head = model((entry("k", ARRAY, struct.pack("<IQ", STRING, 200_000) + words),), infos, data=0)
    remote = Remote(head, 8 * GB)
    assert parse_header(Path("m.gguf"), remote, 8 * GB).tensors["a"].shape == (256, 1 << 24)
    assert remote.n_bytes < len(head) + (2 << 20)
    assert remote.n_requests < 10


def test_a_shard_with_a_small_header_costs_a_quarter_of_a_megabyte() -> None:
    remote = Remote(model((), (info("a", (256,)),), data=0), 8 * GB)
    parse_header(Path("m.gguf"), remote, 8 * GB)
    assert (remote.n_bytes, remote.n_requests) == (1 << 18, 1)


# Heads of files of 8 GB: every count fits the size.
HUGE: dict[str, tuple[bytes, str]] = {
    "entries": (model(n_entries=1 << 28), "more than any model has"),
    "tensors": (model(n_tensors=1 << 27), "more than any model has"),
    "empty texts": (model((entry("k", ARRAY, struct.pack("<IQ", STRING, (1 << 22) + 1)),)), "more than 4194304 values"),
    "arrays that are each small enough": (
        model(tuple(entry(f"k{n}", ARRAY, struct.pack("<IQ", STRING, 1 << 21) + bytes(8 << 21)) for n in range(3))),
        "more than 4194304 values",
    ),
    "texts that are each small enough": (
        model(tuple(entry(f"k{n}", STRING, struct.pack("<Q", 1 << 25) + bytes(1 << 25)) for n in range(5))),
        "more than 128 MiB",
    ),
    "an alignment beyond the file": (
        model((entry("general.alignment", 4, struct.pack("<I", 1 << 31)),), (info("a", (4,), offset=1 << 33),)),
        "truncated",
    ),
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_hostile_head_of_a_huge_file_is_refused_within_its_budget(kind: str) -> None:
    head, telling = HUGE[kind]
    remote, started = Remote(head, 8 * GB), time.process_time()
    line = refused(remote)
    assert len(line.splitlines()) == 1
    assert telling in line
    assert remote.n_bytes <= 130 << 20
    # Seconds of this process alone, many times what it takes.
    assert time.process_time() - started < 60


def test_an_array_of_many_numbers_does_not_fill_the_memory() -> None:
    head = model((entry("k", ARRAY, struct.pack("<IQ", U8, (1 << 22) + 1)),))
    tracemalloc.start()
    try:
        assert "more than 4194304 values" in refused(Remote(head, 8 * GB))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_what_the_reader_raises_comes_through() -> None:
    def broken(offset: int, length: int) -> bytes:
        raise NotFoundError("gone")

    with pytest.raises(NotFoundError, match="gone"):
        parse_header(Path("m.gguf"), broken, 100)


def test_a_server_that_sends_too_little_is_told_of() -> None:
    with pytest.raises(DynrunError, match="shorter while it was read"):
        parse_header(Path("m.gguf"), lambda offset, length: b"GG", GB)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(rest=st.binary(max_size=200), size=st.integers(208, 1 << 40))
def test_random_heads_of_files_of_any_size_are_read_or_refused(rest: bytes, size: int) -> None:
    remote = Remote(b"GGUF\3\0\0\0" + rest, size)
    line = ""
    try:
        assert parse_header(Path("m.gguf"), remote, size).file_bytes == size
    except DynrunError as error:
        line = str(error)
    assert len(line.splitlines()) <= 1
    assert remote.n_bytes <= 130 << 20


class TestShards:
    def variant(self, monkeypatch: pytest.MonkeyPatch, *shards: bytes) -> Variant:
        names = [f"m-{n + 1:05}-of-{len(shards):05}.gguf" for n in range(len(shards))]
        files = tuple(RemoteFile("o/r", "c", name, len(data), "e") for name, data in zip(names, shards, strict=True))
        contents = dict(zip(names, shards, strict=True))

        class Reader:
            def __init__(self, file: RemoteFile) -> None:
                self.data = contents[file.path]

            def __call__(self, offset: int, length: int) -> bytes:
                return self.data[offset : offset + length]

            def close(self) -> None:
                pass

        monkeypatch.setattr("dynrun.hub.headers.RangeReader", Reader)
        return Variant("Q", files)

    def shard(self, number: int, count: int, name: str) -> bytes:
        numbers: tuple[tuple[str, int], ...] = (
            ("split.no", number),
            ("split.count", count),
            ("split.tensors.count", 2),
        )
        return model(tuple(entry(key, 4, struct.pack("<I", n)) for key, n in numbers), (info(name, (4,)),))

    def test_all_are_one_header(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shards = (self.shard(0, 2, "a"), self.shard(1, 2, "b"))
        header: Header = read_remote_header(self.variant(monkeypatch, *shards))
        assert list(header.tensors) == ["a", "b"]
        assert header.file_bytes == sum(map(len, shards))

    def test_shards_of_two_models_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        variant = self.variant(monkeypatch, self.shard(0, 2, "a"), self.shard(1, 2, "a"))
        with pytest.raises(DynrunError, match="no shard of its model"):
            read_remote_header(variant)

    def test_missing_shards_are_told_before_anything_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        variant = replace(self.variant(monkeypatch, self.shard(0, 2, "a")), missing=(2, 3))
        with pytest.raises(NotFoundError, match="lacks the shards 2, 3"):
            read_remote_header(variant)
