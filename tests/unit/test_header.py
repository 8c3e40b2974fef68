"""Headers of GGUF files: what the gguf package writes is read; what is broken or hostile is one line, at once."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrun.errors import DynrunError, NotFoundError
from dynrun.gguf.header import Header, TensorInfo, padded, read_header
from dynrun.gguf.quant_label import label_of

U32, U64, STRING, ARRAY, U8 = 4, 10, 8, 9, 0


def write_model(path: Path, *, alignment: int | None = None) -> Path:
    """A small valid file with a value of every kind, written by the gguf package."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_uint8("t.u8", 255)
    writer.add_int8("t.i8", -1)
    writer.add_uint16("t.u16", 65535)
    writer.add_int16("t.i16", -2)
    writer.add_uint32("t.u32", 1 << 31)
    writer.add_int32("t.i32", -3)
    writer.add_uint64("t.u64", 1 << 63)
    writer.add_int64("t.i64", -4)
    writer.add_float32("t.f32", 0.5)
    writer.add_float64("t.f64", 0.1)
    writer.add_bool("t.bool", True)
    writer.add_string("t.text", "größer 🦙")
    writer.add_array("t.words", ["a", "", "bc"])
    writer.add_array("t.numbers", [1, 2, 3])
    writer.add_tensor("f32", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("f16", np.ones((2, 3, 4), dtype=np.float16))
    writer.add_tensor("norm", np.ones(7, dtype=np.float32))
    writer.add_tensor("q8", np.zeros((2, 68), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def model(
    entries: tuple[bytes, ...] = (),
    infos: tuple[bytes, ...] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_entries: int | None = None,
    data: int = 4096,
) -> bytes:
    """A file by hand, with ``data`` zero bytes after its header."""
    counts = (len(infos) if n_tensors is None else n_tensors, len(entries) if n_entries is None else n_entries)
    return magic + struct.pack("<IQQ", version, *counts) + b"".join((*entries, *infos)) + bytes(data)


def failure_of(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(DynrunError) as caught:
        read_header(path)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert str(path) in line
    return line


class TestWhole:
    def test_metadata_is_what_was_written(self, tmp_path: Path) -> None:
        header = read_header(write_model(tmp_path / "m.gguf"))
        values = {key: value for key, value in header.metadata.items() if key.startswith("t.")}
        assert values == {
            "t.u8": 255,
            "t.i8": -1,
            "t.u16": 65535,
            "t.i16": -2,
            "t.u32": 1 << 31,
            "t.i32": -3,
            "t.u64": 1 << 63,
            "t.i64": -4,
            "t.f32": 0.5,
            "t.f64": 0.1,
            "t.bool": True,
            "t.text": "größer 🦙",
            "t.words": ["a", "", "bc"],
            "t.numbers": [1, 2, 3],
        }
        assert header.architecture == "llama"

    @pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
    def test_tensors_lie_where_the_gguf_package_reads_them(self, alignment: int | None, tmp_path: Path) -> None:
        path = write_model(tmp_path / "m.gguf", alignment=alignment)
        header, reader = read_header(path), gguf.GGUFReader(path)
        assert header.alignment == (alignment or 32)
        assert header.data_offset == reader.data_offset
        assert header.file_bytes == path.stat().st_size
        found = {
            name: (tensor.type, list(tensor.shape), header.data_offset + tensor.offset, tensor.nbytes)
            for name, tensor in header.tensors.items()
        }
        assert found == {
            tensor.name: (tensor.tensor_type.name, tensor.shape.tolist(), tensor.data_offset, int(tensor.n_bytes))
            for tensor in reader.tensors
        }

    def test_entry_sizes_add_up_to_the_header(self, tmp_path: Path) -> None:
        header = read_header(write_model(tmp_path / "m.gguf"))
        infos = sum(8 + len(name) + 4 + 8 * len(tensor.shape) + 12 for name, tensor in header.tensors.items())
        assert padded(24 + sum(header.kv_bytes.values()) + infos, 32) == header.data_offset

    def test_bits_per_weight_are_those_of_the_whole_file(self, tmp_path: Path) -> None:
        header = read_header(write_model(tmp_path / "m.gguf"))
        assert header.n_elements == 12 + 24 + 7 + 128
        assert header.bpw == header.file_bytes * 8 / (12 + 24 + 7 + 128)

    def test_a_file_without_tensors_has_no_bits_per_weight(self, tmp_path: Path) -> None:
        (tmp_path / "v.gguf").write_bytes(model(data=0))
        header = read_header(tmp_path / "v.gguf")
        assert header.bpw == 0
        assert header.architecture == ""

    def test_trailing_dimensions_of_one_are_dropped(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_bytes(model(infos=(info("a", (4, 2, 1, 1)), info("b", (1, 1), offset=32))))
        tensors = read_header(tmp_path / "m.gguf").tensors
        assert tensors == {"a": TensorInfo("a", "F32", (4, 2), 0, 32), "b": TensorInfo("b", "F32", (1,), 32, 4)}

    def test_an_array_of_arrays_is_read(self, tmp_path: Path) -> None:
        inner = struct.pack("<IQ2B", U8, 2, 1, 2)
        (tmp_path / "m.gguf").write_bytes(model((entry("k", ARRAY, struct.pack("<IQ", ARRAY, 2) + inner * 2),)))
        assert read_header(tmp_path / "m.gguf").metadata == {"k": [[1, 2], [1, 2]]}

    def test_a_large_vocabulary_is_read_quickly(self, tmp_path: Path) -> None:
        words = b"".join(text(f"token{number}") for number in range(150_000))
        (tmp_path / "m.gguf").write_bytes(
            model((entry("k", ARRAY, struct.pack("<IQ", STRING, 150_000) + words), entry("after", U8, b"\7")))
        )
        started = time.monotonic()
        metadata = read_header(tmp_path / "m.gguf").metadata
        assert metadata["k"][149_999] == "token149999"
        assert metadata["after"] == 7
        assert time.monotonic() - started < 5


HOSTILE: dict[str, tuple[bytes, str]] = {
    "another magic": (model(magic=b"GGML"), "does not begin with GGUF"),
    "nothing": (b"", "does not begin with GGUF"),
    "the magic alone": (b"GGUF", "does not begin with GGUF"),
    "version 1": (model(version=1), "version 1"),
    "the other byte order": (model(version=3 << 24), "version 50331648"),
    "countless entries": (model(n_entries=1 << 63), "9223372036854775808 metadata entries"),
    "countless tensors": (model(n_tensors=1 << 63), "9223372036854775808 tensors"),
    "more tensors than there are": (model(n_tensors=100), "GGUF: "),
    "an endless key": (model((struct.pack("<Q", 1 << 62) + b"k" * 20,)), "a text of"),
    "an endless text": (model((entry("k", STRING, struct.pack("<Q", (1 << 64) - 1)),)), "a text of"),
    "an endless array": (model((entry("k", ARRAY, struct.pack("<IQ", U8, 1 << 60)),)), "an array of"),
    "an endless array of texts": (model((entry("k", ARRAY, struct.pack("<IQ", STRING, 1 << 60)),)), "an array of"),
    "an endless array of arrays": (model((entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1 << 60)),)), "an array of"),
    "arrays in arrays in arrays": (model((entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 40),)), "unknown type 9"),
    "an unknown kind of value": (model((entry("k", 99, b""),)), "unknown type 99"),
    "an array of an unknown kind": (model((entry("k", ARRAY, struct.pack("<IQ", 99, 1)),)), "unknown type 99"),
    "a key twice": (model((entry("k", U8, b"\1"), entry("k", U8, b"\2"))), "the key 'k' twice"),
    "an alignment of 0": (model((entry("general.alignment", U32, struct.pack("<I", 0)),)), "alignment of 0"),
    "an alignment of 24": (model((entry("general.alignment", U32, struct.pack("<I", 24)),)), "alignment of 24"),
    "an alignment in words": (model((entry("general.alignment", STRING, text("32")),)), "alignment of '32'"),
    "an alignment that is true": (model((entry("general.alignment", 7, b"\1"),)), "alignment of True"),
    "a huge alignment": (
        model((entry("general.alignment", U64, struct.pack("<Q", 1 << 62)),), (info("a", (4,)),)),
        "truncated",
    ),
    "an unknown tensor type": (model(infos=(info("a", (4,), kind=77),)), "'a' is of unknown type 77"),
    "no dimensions": (model(infos=(info("a", ()),)), "'a' has 0 dimensions"),
    "nine dimensions": (model(infos=(info("a", (1,) * 9),)), "'a' has 9 dimensions"),
    "a dimension of 0": (model(infos=(info("a", (4, 0)),)), "has shape [4, 0]"),
    "more elements than memory": (model(infos=(info("a", (1 << 62, 1 << 62)),)), "has shape"),
    "elements that wrap to few": (model(infos=(info("a", (1 << 32, 1 << 32)),)), "has shape"),
    "a row of half blocks": (model(infos=(info("a", (48,), kind=8),)), "'a' of type Q8_0 has shape [48]"),
    "a tensor twice": (model(infos=(info("a", (4,)), info("a", (4,), offset=32))), "the tensor 'a' twice"),
    "a tensor out of line": (model(infos=(info("a", (4,), offset=4),)), "'a' is not aligned to 32 bytes"),
    "a tensor past the end": (model(infos=(info("a", (4096,)),)), "truncated: 'a' ends past"),
    "an offset past the end": (model(infos=(info("a", (4,), offset=1 << 63),)), "truncated: 'a' ends past"),
    "a name of many lines": (model(infos=(info("a\nb\r\x1b[2J", (4096,)),)), r"'a\nb\r\x1b[2J'"),
    "a name of a megabyte": (model(infos=(info("a" * (1 << 20), (4,), kind=77),)), "unknown type 77"),
}


class TestBroken:
    @pytest.mark.parametrize("kind", HOSTILE)
    def test_a_hostile_file_is_one_line_that_names_the_fault(self, kind: str, tmp_path: Path) -> None:
        data, telling = HOSTILE[kind]
        line = failure_of(tmp_path / "m.gguf", data)
        assert telling in line
        assert len(line) < 600

    def test_a_file_that_ends_anywhere_is_one_line(self, tmp_path: Path) -> None:
        whole = write_model(tmp_path / "whole.gguf").read_bytes()
        path = tmp_path / "cut.gguf"
        for end in [*range(0, len(whole) - 32, 5), len(whole) - 32]:
            failure_of(path, whole[:end])

    @pytest.mark.parametrize(
        ("kind", "form", "n"), [(U8, "<IQ", (1 << 24) + 1), (STRING, "<IQ", 1 << 27), (ARRAY, "<IQ", 1 << 25)]
    )
    def test_a_huge_sparse_file_does_not_fill_the_memory(self, kind: int, form: str, n: int, tmp_path: Path) -> None:
        """The counts fit the size of the file, which takes no place on the disk."""
        path = tmp_path / "m.gguf"
        path.write_bytes(model((entry("k", ARRAY, struct.pack(form, kind, n)),), data=0))
        assert self.peak_of(path) < 64 << 20

    def test_a_huge_text_does_not_fill_the_memory(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(model((entry("k", STRING, struct.pack("<Q", 1 << 31)),), data=0))
        assert self.peak_of(path) < 64 << 20

    def peak_of(self, path: Path) -> int:
        """The most memory, in bytes, that a failed reading took."""
        with path.open("r+b") as stream:
            stream.truncate(1 << 33)
        tracemalloc.start()
        try:
            with pytest.raises(DynrunError):
                read_header(path)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def test_a_missing_file_is_not_found(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError) as caught:
            read_header(tmp_path / "none.gguf")
        assert caught.value.exit_code == 4

    def test_a_folder_is_not_found(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError):
            read_header(tmp_path)

    def test_a_refused_file_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        path = write_model(tmp_path / "m.gguf")
        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(DynrunError, match=r"m\.gguf cannot be read: Permission denied"):
            read_header(path)


@cache
def valid_bytes(folder: Path) -> bytes:
    return write_model(folder / "valid.gguf").read_bytes()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated")


def read_or_refuse(path: Path, data: bytes) -> Header | None:
    """The header, or None for a DynrunError of one line; any other exception is a failure."""
    path.write_bytes(data)
    try:
        return read_header(path)
    except DynrunError as error:
        lines = str(error).splitlines()
    assert len(lines) == 1
    return None


Mutation = Callable[[bytearray], None]


def overwrite(at: int, data: bytes) -> Mutation:
    def mutate(whole: bytearray) -> None:
        start = at % len(whole)
        whole[start : start + len(data)] = data[: len(whole) - start]

    return mutate


def test_a_file_is_parsed_again_only_when_it_has_changed(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf")
    # What was written a moment ago may be written again without another time stamp.
    assert read_header(path) is not read_header(path)
    os.utime(path, (1e9, 1e9))
    before = read_header(path)
    assert read_header(path) is before
    data = path.read_bytes()
    path.write_bytes(data.replace(b"t.u8", b"T.u8"))
    os.utime(path, (1e9, 1e9))
    assert read_header(path).metadata["T.u8"] == before.metadata["t.u8"] == 255


NUMBERS = st.sampled_from([0, 1, 7, 9, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62, (1 << 63) - 1, (1 << 64) - 1])
MUTATIONS = st.one_of(
    st.builds(overwrite, st.integers(0, 1 << 16), st.binary(min_size=1, max_size=16)),
    st.builds(overwrite, st.integers(0, 900), NUMBERS.map(lambda number: struct.pack("<Q", number))),
    st.builds(overwrite, st.integers(0, 900), st.integers(0, 45).map(lambda number: struct.pack("<I", number))),
)


@settings(max_examples=250, deadline=2000, derandomize=True, database=None)
@given(mutations=st.lists(MUTATIONS, min_size=1, max_size=4), end=st.one_of(st.none(), st.integers(0, 3000)))
def test_whatever_is_changed_the_file_is_read_or_refused_in_one_line(
    folder: Path, mutations: list[Mutation], end: int | None
) -> None:
    data = bytearray(valid_bytes(folder))
    for mutate in mutations:
        mutate(data)
    header = read_or_refuse(folder / "m.gguf", bytes(data[:end]))
    if header is not None:
        ends = [header.data_offset + tensor.offset + tensor.nbytes for tensor in header.tensors.values()]
        assert max(ends, default=0) <= header.file_bytes


@settings(max_examples=150, deadline=2000, derandomize=True, database=None)
@given(rest=st.binary(max_size=300))
def test_random_bytes_after_the_magic_are_read_or_refused_in_one_line(folder: Path, rest: bytes) -> None:
    header = read_or_refuse(folder / "m.gguf", b"GGUF\3\0\0\0" + rest)
    assert header is None or header.file_bytes == 8 + len(rest)


class TestLabel:
    def header(self, tmp_path: Path, entries: tuple[bytes, ...], infos: tuple[bytes, ...] = ()) -> Header:
        (tmp_path / "m.gguf").write_bytes(model(entries, infos))
        return read_header(tmp_path / "m.gguf")

    def test_is_the_one_dynrun_gave(self, tmp_path: Path) -> None:
        entries = (
            entry("general.file_type", U32, struct.pack("<I", 10)),
            entry("dynrun.label", STRING, text("Q2_K_XL")),
        )
        assert label_of(self.header(tmp_path, entries)) == "Q2_K_XL"

    @pytest.mark.parametrize("ftype", [ftype for ftype in gguf.LlamaFileType if ftype < 1024])
    def test_else_it_is_the_file_types_name(self, ftype: Any, tmp_path: Path) -> None:
        header = self.header(tmp_path, (entry("general.file_type", U32, struct.pack("<I", ftype)),))
        assert label_of(header) == ftype.name.removeprefix("MOSTLY_").removeprefix("ALL_")

    def test_else_it_is_the_type_of_most_weights(self, tmp_path: Path) -> None:
        infos = (info("a", (8,)), info("b", (32, 2), kind=8, offset=32), info("c", (8,), offset=128))
        entries = (entry("general.file_type", U32, struct.pack("<I", 999)),)
        assert label_of(self.header(tmp_path, entries, infos)) == "Q8_0"

    def test_a_file_without_tensors_has_none(self, tmp_path: Path) -> None:
        assert label_of(self.header(tmp_path, ())) == "?"
