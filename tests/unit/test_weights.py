"""Weights as float32: rows and bytes against the gguf package's own conversions."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from dynrun.errors import DynrunError, UsageError
from dynrun.gguf.weights import Rows, WeightFile, encode

TYPES = ("F32", "F16", "BF16")


def quantize(values: Rows, name: str) -> npt.NDArray[np.uint8]:
    kind = gguf.GGMLQuantizationType[name]
    return np.ascontiguousarray(gguf.quants.quantize(values, kind)).view(np.uint8)


def write(path: Path, name: str, values: Rows) -> Path:
    """A file with one tensor ``w``, stored as ``name`` by the gguf package, after one of odd length."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("norm", np.ones(3, dtype=np.float32))
    kind = gguf.GGMLQuantizationType[name]
    writer.add_tensor("w", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def values() -> Rows:
    """Three experts of four rows of 64."""
    return np.random.default_rng(1).normal(0, 0.1, (3, 4, 64)).astype(np.float32)


@pytest.mark.parametrize("name", TYPES)
class TestRows:
    def expected(self, values: Rows, name: str) -> Rows:
        kind = gguf.GGMLQuantizationType[name]
        rows: Rows = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind).reshape(12, 64)
        return rows

    def test_are_those_of_the_gguf_package(self, name: str, values: Rows, tmp_path: Path) -> None:
        file = WeightFile(write(tmp_path / "m.gguf", name, values))
        assert file.n_rows("w") == 12
        assert file.n_rows("norm") == 1
        rows = file.rows("w")
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, self.expected(values, name))

    def test_of_an_expert_and_a_sample_are_the_same_rows(self, name: str, values: Rows, tmp_path: Path) -> None:
        file = WeightFile(write(tmp_path / "m.gguf", name, values))
        np.testing.assert_array_equal(file.rows("w", slice(4, 8)), self.expected(values, name)[4:8])
        sample = np.array([11, 0, 5])
        np.testing.assert_array_equal(file.rows("w", sample), self.expected(values, name)[sample])

    def test_encoded_are_the_bytes_of_the_file(self, name: str, values: Rows, tmp_path: Path) -> None:
        file = WeightFile(write(tmp_path / "m.gguf", name, values))
        np.testing.assert_array_equal(encode(file.rows("w"), name), quantize(values, name).reshape(-1))


@pytest.mark.parametrize("name", TYPES)
def test_encode_gives_the_bytes_of_the_gguf_package(name: str) -> None:
    """Also where rounding ties, for the smallest and largest values, infinities and NaN."""
    bits = np.arange(0, 1 << 32, 65_521, dtype=np.uint64).astype(np.uint32)
    ties = (np.arange(1 << 12, dtype=np.uint32) << 20) + 0x8000
    special = np.array([0, 0x80000000, 1, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF])
    values = np.concatenate([bits, ties, special.astype(np.uint32)]).view(np.float32)
    if name == "F16":
        values = values[np.abs(values) < 65_504]
    with np.errstate(invalid="ignore"):
        values = values[: len(values) // 32 * 32].reshape(-1, 32)
        np.testing.assert_array_equal(encode(values, name), quantize(values, name).reshape(-1))


def test_a_nan_stays_one_in_bf16() -> None:
    nan = np.array([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], dtype=np.uint32).view(np.float32)
    back = (encode(nan, "BF16").view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    assert np.isnan(back).all()


def test_a_quantized_tensor_is_one_line_that_names_it(values: Rows, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "Q8_0", values)
    with pytest.raises(UsageError, match=r"w of .*m\.gguf is already Q8_0 — start from an F16") as caught:
        WeightFile(path).rows("w")
    assert caught.value.exit_code == 2


def test_a_truncated_file_is_refused(values: Rows, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "F16", values)
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(DynrunError, match="truncated"):
        WeightFile(path)


def test_values_are_not_encoded_as_a_quantized_type(values: Rows) -> None:
    with pytest.raises(UsageError, match="cannot write values as Q8_0"):
        encode(values, "Q8_0")


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_one_line_that_names_the_tensor(name: str, value: float, tmp_path: Path) -> None:
    bad = np.ones((2, 32), dtype=np.float32)
    bad[1, 3] = value
    weights = WeightFile(write(tmp_path / "model.gguf", name, bad))
    assert np.isfinite(weights.rows("w", slice(0, 1))).all()
    with pytest.raises(DynrunError, match=r"^w of .*not finite"):
        weights.rows("w")
    assert not np.isfinite(weights.rows("w", finite=False)).all()
