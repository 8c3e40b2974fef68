"""Headers that are read by ranges: few bytes of large files, and bounded work for hostile ones."""

from __future__ import annotations

import struct
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrun.errors import DynrunError, NotFoundError
from dynrun.gguf.header import parse_header, read_header
from dynrun.hub.files import RemoteFile, Variant
from dynrun.hub.headers import HeaderReader
from tests.memory_ranges import Ranges
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


def reader_of(contents: dict[str, bytes]) -> HeaderReader:
    opened: Any = lambda file: Ranges(contents[file.path])  # noqa: E731
    return HeaderReader(opened)


def variant_of(contents: dict[str, bytes], label: str = "Q") -> Variant:
    return Variant(label, tuple(RemoteFile("o/r", "c", name, len(data), "e") for name, data in contents.items()))


class TestShards:
    def shard(self, number: int, count: int, name: str) -> bytes:
        numbers = (("split.no", number), ("split.count", count), ("split.tensors.count", 2))
        return model(tuple(entry(key, 4, struct.pack("<I", n)) for key, n in numbers), (info(name, (4,)),))

    def test_all_are_one_header(self) -> None:
        contents = {"m-1": self.shard(0, 2, "a"), "m-2": self.shard(1, 2, "b")}
        header = reader_of(contents)(variant_of(contents))
        assert list(header.tensors) == ["a", "b"]
        assert header.file_bytes == sum(map(len, contents.values()))

    def test_shards_of_two_models_are_refused(self) -> None:
        contents = {"m-1": self.shard(0, 2, "a"), "m-2": self.shard(1, 2, "a")}
        with pytest.raises(DynrunError, match="no shard of its model"):
            reader_of(contents)(variant_of(contents))

    def test_missing_shards_are_told_before_anything_is_read(self) -> None:
        contents = {"m-1": self.shard(0, 2, "a")}
        with pytest.raises(NotFoundError, match="lacks the shards 2, 3"):
            reader_of(contents)(replace(variant_of(contents), missing=(2, 3)))


class TestQuantsOfOneRepository:
    WORDS = b"".join(text(f"token{number:030}") for number in range(50_000))

    def quant(self, ftype: int, kind: int, extra: bytes = b"") -> bytes:
        entries = [entry("general.file_type", 4, struct.pack("<I", ftype))]
        entries += [entry("k", ARRAY, struct.pack("<IQ", STRING, 50_000) + self.WORDS)]
        entries += [extra] if extra else []
        return model(tuple(entries), (info("a", (256, 4), kind), info("b", (32,), offset=1 << 12)), data=1 << 14)

    def test_the_metadata_are_fetched_once(self) -> None:
        contents = {"f16": self.quant(1, 1), "q4": self.quant(15, 12), "q6": self.quant(18, 14)}
        read = reader_of(contents)
        headers = {name: read(variant_of({name: data})) for name, data in contents.items()}
        assert {name: header.tensors["a"].type for name, header in headers.items()} == {
            "f16": "F16",
            "q4": "Q4_K",
            "q6": "Q6_K",
        }
        assert headers["q6"].metadata["k"][49_999] == f"token{49_999:030}"
        assert headers["q6"].data_offset == headers["f16"].data_offset
        assert "general.file_type" not in headers["q6"].metadata
        assert read.fetched_bytes < len(contents["f16"]) + 4 * (1 << 18)

    @pytest.mark.parametrize("extra", [entry("x", U8, b"\1"), b""])
    def test_another_model_is_read_whole(self, extra: bytes) -> None:
        shifted = self.quant(15, 12, extra)
        if not extra:
            # As long as the first one, with other tensors.
            shifted = shifted.replace(text("a"), text("c"))
        contents = {"f16": self.quant(1, 1), "other": shifted}
        read = reader_of(contents)
        read(variant_of({"f16": contents["f16"]}))
        header = read(variant_of({"other": shifted}))
        assert header.metadata["general.file_type"] == 15
        assert set(header.tensors) == ({"a", "b"} if extra else {"c", "b"})
