"""A GGUF written again with some of its tensors in other types; the gguf package reads what comes out."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from dynrun.errors import DynrunError
from dynrun.gguf.header import Header, padded, read_header
from dynrun.gguf.rewrite import rewrite
from dynrun.gguf.tensor_types import TENSOR_TYPES

TYPES = {"matrix": "Q4_K", "experts": "Q8_0", "last": "IQ4_NL"}


def write_model(path: Path, alignment: int | None = None) -> Path:
    """Tensors of one, two and three dimensions, one of them quantized, and sizes that need padding."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_string("t.text", "größer 🦙")
    writer.add_array("t.words", ["a", "", "bc"])
    writer.add_float64("t.f64", 0.1)
    writer.add_tensor("norm", np.ones(7, dtype=np.float32))
    writer.add_tensor("matrix", random.standard_normal((5, 256)).astype(np.float16))
    writer.add_tensor("q8", np.full((2, 68), 3, dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("experts", random.standard_normal((3, 4, 64)).astype(np.float32))
    writer.add_tensor("größe", random.standard_normal((2, 3)).astype(np.float16))
    writer.add_tensor("last", random.standard_normal((3, 32)).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def source(tmp_path: Path) -> Header:
    return read_header(write_model(tmp_path / "source.gguf"))


def new_data(source: Header, types: dict[str, str]) -> dict[str, npt.NDArray[np.uint8]]:
    """Bytes of the size that each tensor has in its new type, row by row."""
    random, found = np.random.default_rng(1), {}
    for name, type_name in types.items():
        n_rows = source.tensors[name].n_elements // source.tensors[name].shape[0]
        size = TENSOR_TYPES[type_name].nbytes(source.tensors[name].n_elements)
        found[name] = random.integers(0, 256, (n_rows, size // n_rows), dtype=np.uint8)
    return found


def bytes_of(header: Header, name: str) -> bytes:
    start = header.data_offset + header.tensors[name].offset
    return header.path.read_bytes()[start : start + header.tensors[name].nbytes]


def metadata_of(header: Header) -> bytes:
    return header.path.read_bytes()[: 24 + sum(header.kv_bytes.values())]


@pytest.mark.parametrize("alignment", [None, 64])
def test_the_named_tensors_have_their_new_types_and_bytes_and_all_else_is_as_it_was(
    tmp_path: Path, alignment: int | None
) -> None:
    source = read_header(write_model(tmp_path / "source.gguf", alignment))
    data, path = new_data(source, TYPES), tmp_path / "new" / "out.gguf"
    rewrite(source, path, TYPES, data.__getitem__)
    out = read_header(path)
    assert metadata_of(out) == metadata_of(source)
    assert out.metadata == source.metadata
    assert list(out.tensors) == list(source.tensors)
    for name, tensor in out.tensors.items():
        assert tensor.shape == source.tensors[name].shape, name
        assert tensor.type == TYPES.get(name, source.tensors[name].type)
        assert bytes_of(out, name) == (data[name].tobytes() if name in TYPES else bytes_of(source, name)), name
    sizes = sum(padded(tensor.nbytes, out.alignment) for tensor in out.tensors.values())
    assert out.file_bytes == out.data_offset + sizes


def test_another_reader_finds_the_same_in_it(tmp_path: Path, source: Header) -> None:
    data = new_data(source, TYPES)
    rewrite(source, tmp_path / "out.gguf", TYPES, data.__getitem__)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name, type_name in TYPES.items():
        assert found[name].tensor_type.name == type_name
        assert found[name].shape.tolist() == list(source.tensors[name].shape)
        assert found[name].data.tobytes() == data[name].tobytes()
    assert found["norm"].data.tolist() == [1.0] * 7
    assert reader.fields["t.text"].contents() == "größer 🦙"


def test_a_file_of_which_nothing_changes_is_the_same_file(tmp_path: Path, source: Header) -> None:
    rewrite(source, tmp_path / "out.gguf", {}, lambda _: np.empty(0, dtype=np.uint8))
    assert (tmp_path / "out.gguf").read_bytes() == source.path.read_bytes()


def test_data_are_asked_for_once_each_in_the_order_of_the_file(tmp_path: Path, source: Header) -> None:
    types = dict(reversed(TYPES.items()))
    data, asked = new_data(source, types), list[str]()

    def data_of(name: str) -> npt.NDArray[np.uint8]:
        asked.append(name)
        return data[name]

    rewrite(source, tmp_path / "out.gguf", types, data_of)
    assert asked == list(TYPES)


def test_data_that_are_a_view_of_others_are_written_as_they_look(tmp_path: Path, source: Header) -> None:
    data = new_data(source, {"matrix": "Q4_K"})["matrix"]
    wide = np.repeat(data, 2, axis=1)
    rewrite(source, tmp_path / "out.gguf", {"matrix": "Q4_K"}, lambda _: wide[:, ::2])
    assert bytes_of(read_header(tmp_path / "out.gguf"), "matrix") == data.tobytes()


@pytest.mark.parametrize("change", [-1, 1])
def test_the_wrong_number_of_bytes_leaves_no_file_and_what_was_there_stays(
    tmp_path: Path, source: Header, change: int
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old.gguf").write_bytes(b"old")
    size = TENSOR_TYPES["Q4_K"].nbytes(source.tensors["matrix"].n_elements) + change
    for name in ("new.gguf", "old.gguf"):
        with pytest.raises(DynrunError, match=rf"^{size} bytes for matrix of 720 in Q4_K"):
            rewrite(source, folder / name, {"matrix": "Q4_K"}, lambda _: np.zeros(size, dtype=np.uint8))
    assert [path.name for path in folder.iterdir()] == ["old.gguf"]
    assert (folder / "old.gguf").read_bytes() == b"old"


def test_a_source_that_became_shorter_leaves_no_file(tmp_path: Path, source: Header) -> None:
    source.path.write_bytes(source.path.read_bytes()[:-200])
    with pytest.raises(DynrunError, match="became shorter"):
        rewrite(source, tmp_path / "out.gguf", {}, lambda _: np.empty(0, dtype=np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]
