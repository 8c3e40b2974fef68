"""Imatrix files of any origin: what is read is what llama.cpp would read; damage ends in one line."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from dynrun.calibration.experts import shrink_experts
from dynrun.calibration.imatrix import Imatrix, load_imatrix, merge, missing_entries, read_imatrix, write_imatrix
from dynrun.errors import DynrunError, NotFoundError, UsageError
from dynrun.gguf.header import read_header
from tests.tiny import write_tiny_llama

Arrays = Mapping[str, Any]


def imatrix(seed: int = 0, n_expert: int = 3, width: int = 8) -> Imatrix:
    """A dense and an expert entry with random sums; the last expert saw nothing."""
    random = np.random.default_rng(seed)
    counts = np.array([*range(5, 4 + n_expert), 0], dtype=np.float64)
    experts = random.random((n_expert, width)).astype(np.float32) * counts[:, None]
    return Imatrix(
        {"blk.0.attn_q.weight": random.random((1, width)) * 40, "blk.0.ffn_up_exps.weight": experts},
        {"blk.0.attn_q.weight": np.array([40.0]), "blk.0.ffn_up_exps.weight": counts},
        ("one", "two"),
        5,
        128,
    )


def assert_same(a: Imatrix, b: Imatrix, rtol: float = 1e-6) -> None:
    assert set(a.sums) == set(b.sums)
    for name in a.sums:
        assert np.array_equal(a.counts[name], b.counts[name])
        assert np.array_equal(a.seen[name], b.seen[name])
        np.testing.assert_allclose(a.sums[name], b.sums[name], rtol=rtol)


def gguf(path: Path, tensors: Arrays, **metadata: str) -> Path:
    writer = GGUFWriter(str(path), "")
    writer.kv_data[0].pop("general.architecture", None)
    for key, value in ({"general.type": "imatrix"} | metadata).items():
        writer.add_string(key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, np.asarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dat(path: Path, entries: Mapping[str, tuple[int, list[float]]], *, trailer: bytes | None = None) -> Path:
    data = struct.pack("<i", len(entries))
    for name, (n_calls, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", n_calls, len(values))
        data += struct.pack(f"<{len(values)}f", *values)
    path.write_bytes(data + (struct.pack("<ii", 7, 5) + b"a.txt" if trailer is None else trailer))
    return path


def test_what_is_written_is_read_back_with_its_origin(tmp_path: Path) -> None:
    write_imatrix(imatrix(), tmp_path / "i.gguf")
    again = read_imatrix(tmp_path / "i.gguf")
    assert_same(again, imatrix())
    assert (again.datasets, again.chunk_count, again.chunk_size, again.estimated) == (("one", "two"), 5, 128, False)


def test_given_origin_replaces_the_imatrixs_own(tmp_path: Path) -> None:
    write_imatrix(imatrix(), tmp_path / "i.gguf", dataset="three", chunk_count=9, chunk_size=64)
    again = read_imatrix(tmp_path / "i.gguf")
    assert (again.datasets, again.chunk_count, again.chunk_size) == (("three",), 9, 64)


def test_the_same_imatrix_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_imatrix(shrink_experts(imatrix(), 100), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tokens_of_experts_are_written_only_where_they_differ_from_the_counts(tmp_path: Path) -> None:
    write_imatrix(imatrix(), tmp_path / "raw.gguf")
    write_imatrix(shrink_experts(imatrix(), 100), tmp_path / "shrunk.gguf")
    keys = [k for k in read_header(tmp_path / "shrunk.gguf").metadata if k.startswith("dynrun.")]
    assert keys == ["dynrun.expert_tokens.blk.0.ffn_up_exps.weight"]
    assert not [k for k in read_header(tmp_path / "raw.gguf").metadata if k.startswith("dynrun.")]
    assert_same(read_imatrix(tmp_path / "shrunk.gguf"), shrink_experts(imatrix(), 100))


# -- damage ------------------------------------------------------------------------------------------------------------

SUMS, COUNTS = np.ones((2, 4), np.float32), np.ones((2, 1), np.float32)
DAMAGES: dict[str, tuple[Arrays, str]] = {
    "counts missing": ({"w.in_sum2": SUMS}, "'w' has sums and no counts"),
    "sums missing": ({"w.in_sum2": SUMS, "w.counts": COUNTS, "v.counts": COUNTS}, "'v' has counts and no sums"),
    "three counts for two": ({"w.in_sum2": SUMS, "w.counts": np.ones((3, 1), np.float32)}, r"shape \[4, 2\] and 3"),
    "rows and columns swapped": ({"w.in_sum2": SUMS.reshape(4, 2), "w.counts": COUNTS}, r"shape \[2, 4\] and 2"),
    "F16": ({"w.in_sum2": SUMS.astype(np.float16), "w.counts": COUNTS}, "is F16, not F32"),
    "NaN": ({"w.in_sum2": SUMS * np.nan, "w.counts": COUNTS}, "sums that are not finite or negative"),
    "infinite": ({"w.in_sum2": SUMS * np.inf, "w.counts": COUNTS}, "sums that are not finite or negative"),
    "negative": ({"w.in_sum2": -SUMS, "w.counts": COUNTS}, "sums that are not finite or negative"),
    "negative counts": ({"w.in_sum2": SUMS, "w.counts": -COUNTS}, "counts that are not finite or negative"),
    "nothing": ({"w": SUMS}, "with 0 entries, no imatrix"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_entry_is_named_in_one_line(tmp_path: Path, what: str) -> None:
    tensors, message = DAMAGES[what]
    path = gguf(tmp_path / "i.gguf", tensors)
    with pytest.raises(DynrunError, match=message) as raised:
        load_imatrix(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("tokens", [[1.0], [1.0, np.nan, 0.0], [-1.0, 5.0, 0.0], [5.0, 7.0, 0.0]])
def test_impossible_tokens_of_experts_are_damage(tmp_path: Path, tokens: list[float]) -> None:
    plain = imatrix()
    name = "blk.0.ffn_up_exps.weight"
    broken = Imatrix(plain.sums, plain.counts, seen={name: np.array(tokens)})
    write_imatrix(broken, tmp_path / "i.gguf")
    with pytest.raises(DynrunError, match="does not fit its counts"):
        read_imatrix(tmp_path / "i.gguf")


def test_a_file_cut_anywhere_ends_in_one_line(tmp_path: Path) -> None:
    write_imatrix(imatrix(), tmp_path / "i.gguf")
    dat(tmp_path / "i.dat", {"a.weight": (3, [1.0, 2.0]), "b.weight": (3, [1.0, 2.0])}, trailer=b"")
    for name in ("i.gguf", "i.dat"):
        whole = (tmp_path / name).read_bytes()
        for length in range(0, len(whole) - 32, 7):
            (tmp_path / "cut").write_bytes(whole[:length])
            with pytest.raises(DynrunError, match="is no imatrix"):
                load_imatrix(tmp_path / "cut")


def test_a_model_is_no_imatrix(tmp_path: Path) -> None:
    with pytest.raises(DynrunError, match="no imatrix"):
        load_imatrix(write_tiny_llama(tmp_path / "tiny.gguf"))


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        load_imatrix(tmp_path / "absent.dat")


# -- legacy ------------------------------------------------------------------------------------------------------------


def test_a_legacy_file_gives_the_means_that_llama_quantize_uses(tmp_path: Path) -> None:
    path = dat(tmp_path / "i.dat", {"a.weight": (3, [3.0, 6.0, 10.0]), "b.weight": (0, [5.0])})
    read = load_imatrix(path)
    assert (read.datasets, read.chunk_count, read.estimated) == (("a.txt",), 7, True)
    for name, expected in {"a.weight": [1, 2, np.float32(10) / np.float32(3)], "b.weight": [5]}.items():
        mean = read.mean(name)
        assert mean is not None
        assert mean.astype(np.float32).tolist() == [expected]
    assert read.counts["a.weight"].tolist() == [3 * 512]


def test_a_legacy_file_without_trailer_is_whole(tmp_path: Path) -> None:
    read = load_imatrix(dat(tmp_path / "i.dat", {"a.weight": (1, [1.0])}, trailer=b""))
    assert (read.datasets, read.chunk_count) == ((), 0)


def test_legacy_experts_are_told_apart_by_the_models_shapes(tmp_path: Path) -> None:
    path = dat(tmp_path / "i.dat", {"w_exps.weight": (2, [2.0, 4.0, 2.0, 2.0, 6.0, 8.0])})
    assert load_imatrix(path).sums["w_exps.weight"].shape == (1, 6)
    read = load_imatrix(path, {"w_exps.weight": (2, 5, 3)})
    mean = read.mean("w_exps.weight")
    assert mean is not None
    assert mean.tolist() == [[1.0, 2.0], [1.0, 1.0], [3.0, 4.0]]
    # Ones throughout are how the legacy format says that an expert saw nothing.
    assert read.counts["w_exps.weight"].tolist() == [1024, 0, 1024]


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "no entries": lambda _: struct.pack("<i", 0) + b"\0" * 40,
    "minus one entries": lambda _: struct.pack("<i", -1) + b"\0" * 40,
    "two thousand million entries": lambda whole: struct.pack("<i", 2**31 - 1) + whole[4:],
    "a name of minus one bytes": lambda whole: whole[:4] + struct.pack("<i", -1) + whole[8:],
    "a name of a gigabyte": lambda whole: whole[:4] + struct.pack("<i", 1 << 30) + whole[8:],
    "a name that is no text": lambda whole: whole[:8] + b"\xff" + whole[9:],
    "minus one values": lambda whole: whole[:20] + struct.pack("<i", -1) + whole[24:],
    "two thousand million values": lambda whole: whole[:20] + struct.pack("<i", 2**31 - 1) + whole[24:],
    "minus one calls": lambda whole: whole[:16] + struct.pack("<i", -1) + whole[20:],
    "NaN": lambda whole: whole[:24] + struct.pack("<f", np.nan) + whole[28:],
    "a negative value": lambda whole: whole[:24] + struct.pack("<f", -1) + whole[28:],
    "text": lambda _: b"This is a text file, no imatrix, and long enough to look like something.",
    "an empty file": lambda _: b"",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_legacy_file_ends_in_one_line(tmp_path: Path, what: str) -> None:
    path = dat(tmp_path / "i.dat", {"a.weight": (2, [1.0, 2.0])})
    path.write_bytes(HOSTILE[what](path.read_bytes()))
    with pytest.raises(DynrunError, match="is no imatrix"):
        load_imatrix(path)


# -- against a model ---------------------------------------------------------------------------------------------------


def test_an_imatrix_of_another_model_is_refused(tmp_path: Path) -> None:
    write_imatrix(imatrix(), tmp_path / "i.gguf")
    experts = "blk.0.ffn_up_exps.weight"
    for shapes, message in (
        ({"blk.0.attn_q.weight": (16, 8)}, r"'blk.0.attn_q.weight' is \[1, 8\], here \[1, 16\] is wanted"),
        ({experts: (8, 9, 4)}, r"is \[3, 8\], here \[4, 8\] is wanted"),
        ({experts: (24, 9)}, r"here \[1, 24\] is wanted"),
        ({"other.weight": (8, 8)}, "none of its 2 entries is a weight of this one"),
    ):
        with pytest.raises(UsageError, match=message):
            load_imatrix(tmp_path / "i.gguf", shapes)
    assert_same(load_imatrix(tmp_path / "i.gguf", {experts: (8, 9, 3)}), imatrix())


def test_one_count_for_the_matrices_of_a_dense_weight_is_a_count_for_each(tmp_path: Path) -> None:
    path = gguf(tmp_path / "i.gguf", {"k_b.in_sum2": SUMS.reshape(1, 8), "k_b.counts": np.full((1, 1), 2, np.float32)})
    read = load_imatrix(path, {"k_b": (4, 7, 2)})
    assert read.sums["k_b"].shape == (2, 4)
    assert read.counts["k_b"].tolist() == [2, 2]


def test_weights_without_an_entry_are_listed(tmp_path: Path) -> None:
    header = read_header(write_tiny_llama(tmp_path / "tiny.gguf", n_block=1, n_expert=3))
    missing = missing_entries(imatrix(width=256), header)
    blocks = ["attn_k", "attn_v", "attn_output", "ffn_gate_exps", "ffn_down_exps"]
    assert set(missing) == {f"blk.0.{name}.weight" for name in blocks} | {"output.weight"}
    empty = Imatrix({"output.weight": np.zeros((1, 256))}, {"output.weight": np.zeros(1)})
    assert "output.weight" in missing_entries(empty, header)


# -- merging -----------------------------------------------------------------------------------------------------------


def test_merging_adds_sums_and_counts_and_joins_the_origins() -> None:
    a, b = imatrix(0), imatrix(1)
    merged = merge([a, b])
    for name in a.sums:
        np.testing.assert_allclose(merged.sums[name], a.sums[name] + b.sums[name])
        assert np.array_equal(merged.counts[name], a.counts[name] + b.counts[name])
    assert (merged.datasets, merged.chunk_count, merged.chunk_size) == (("one", "two"), 10, 128)


def test_an_entry_that_only_one_has_is_kept() -> None:
    other = Imatrix({"x": np.ones((1, 2))}, {"x": np.ones(1)})
    assert set(merge([imatrix(), other]).sums) == {*imatrix().sums, "x"}


def test_merging_leaves_out_what_shrinking_added(tmp_path: Path) -> None:
    write_imatrix(shrink_experts(imatrix(0), 1000), tmp_path / "shrunk.gguf")
    merged = merge([read_imatrix(tmp_path / "shrunk.gguf"), imatrix(1)])
    assert_same(merged, merge([imatrix(0), imatrix(1)]), rtol=1e-4)


def test_one_count_for_all_experts_is_a_count_for_each_when_merged() -> None:
    name = "blk.0.ffn_up_exps.weight"
    flat = Imatrix({name: np.full((1, 24), 7.0)}, {name: np.array([2.0])})
    for order in ([flat, imatrix()], [imatrix(), flat]):
        assert np.array_equal(merge(order).counts[name], imatrix().counts[name] + 2)


@pytest.mark.parametrize("other", [imatrix(width=16), imatrix(n_expert=4)])
def test_imatrices_of_different_models_are_not_merged(other: Imatrix) -> None:
    with pytest.raises(UsageError, match=r"different models: 'blk\.0\.(attn_q|ffn_up_exps)\.weight' has shapes"):
        merge([imatrix(), other])


def test_nothing_cannot_be_merged() -> None:
    with pytest.raises(UsageError, match="no imatrix to merge"):
        merge([])
