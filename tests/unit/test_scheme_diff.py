"""Schemes out of GGUFs, split ones too, and what two of them differ in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter

from dynrun.errors import DynrunError, NotFoundError, UsageError
from dynrun.gguf.header import read_header
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.shards import read_whole_header, shard_path
from dynrun.scheme import Scheme, render, write_scheme
from dynrun.scheme_diff import Change, compare
from dynrun.scheme_gguf import open_scheme, quantized_beyond, shares
from tests.tiny import write_tiny_llama

SMALL: dict[str, Any] = {"n_embd": 64, "n_ff": 64, "n_block": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", **SMALL)


def write_shard(
    prefix: Path, index: int, count: int, tensors: list[str], *, total: int, number: int | None = None
) -> Path:
    """A shard with F16 tensors of 64 columns and 2 rows; ``number`` is what it says of itself, from 0."""
    import numpy as np

    path = shard_path(prefix, index + 1, count)
    writer = GGUFWriter(path, "llama")
    if index == 0:
        writer.add_name("split model")
        writer.add_file_type(15)
    writer.add_uint16("split.no", index if number is None else number)
    writer.add_uint16("split.count", count)
    writer.add_int32("split.tensors.count", total)
    for name in tensors:
        writer.add_tensor(name, np.zeros((2, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_gives_its_types_and_what_its_metadata_tells(model: Path) -> None:
    opened = open_scheme(model)
    header = read_header(model)
    assert opened.scheme == Scheme(
        types=dict.fromkeys(quantizable(header), "F16"),
        label="F16",
        architecture="llama",
        source="tiny",
        size_bytes=model.stat().st_size,
    )
    assert {name for name in opened.kept if "norm" not in name} == set()
    assert set(opened.kept) | set(opened.shapes) == set(header.tensors)


def test_a_scheme_of_a_gguf_is_read_back_for_the_same_model(model: Path, tmp_path: Path) -> None:
    scheme = open_scheme(model).scheme
    write_scheme(scheme, tmp_path / "s.toml")
    opened = open_scheme(tmp_path / "s.toml", quantizable(read_header(model)))
    assert opened.scheme == scheme
    assert not opened.shapes


def test_any_shard_stands_for_the_whole_model(tmp_path: Path) -> None:
    names = [["token_embd.weight", "blk.0.attn_norm.weight"], ["blk.0.attn_q.weight"], ["blk.1.attn_q.weight"]]
    paths = [write_shard(tmp_path / "m", i, 3, part, total=4) for i, part in enumerate(names)]
    for path in paths:
        opened = open_scheme(path)
        assert list(opened.scheme.types) == ["token_embd.weight", "blk.0.attn_q.weight", "blk.1.attn_q.weight"]
        assert list(opened.kept) == ["blk.0.attn_norm.weight"]
        assert (opened.scheme.source, opened.scheme.label) == ("split model", "Q4_K_M")
        assert opened.scheme.size_bytes == sum(one.stat().st_size for one in paths)
    assert "split.count" not in read_whole_header(paths[1]).metadata


def test_shards_that_are_missing_or_do_not_belong_together_are_named(tmp_path: Path) -> None:
    first = write_shard(tmp_path / "m", 0, 2, ["output.weight"], total=2)
    with pytest.raises(NotFoundError, match=r"m-00002-of-00002\.gguf does not exist, one of the 2 shards"):
        open_scheme(first)
    write_shard(tmp_path / "m", 1, 2, ["output.weight"], total=2)
    with pytest.raises(DynrunError, match=r"m-00002-of-00002\.gguf .* has 'output\.weight', which a shard before"):
        open_scheme(first)
    write_shard(tmp_path / "m", 1, 2, ["token_embd.weight"], total=2, number=0)
    with pytest.raises(DynrunError, match=r"m-00002-of-00002\.gguf .* it is number 0 of 2"):
        open_scheme(first)
    write_shard(tmp_path / "m", 1, 2, ["token_embd.weight"], total=3)
    write_shard(tmp_path / "m", 0, 2, ["output.weight"], total=3)
    with pytest.raises(DynrunError, match="have 2 tensors of 3"):
        open_scheme(first)
    with pytest.raises(UsageError, match=r"renamed\.gguf is one of 2 shards, and its name does not say which"):
        open_scheme(first.rename(tmp_path / "renamed.gguf"))


def test_a_gguf_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "m", 0, 1, ["blk.0.attn_norm.weight"], total=1)
    with pytest.raises(UsageError, match="no tensors that a scheme could be about"):
        open_scheme(path)
    with pytest.raises(NotFoundError):
        open_scheme(tmp_path / "none.gguf")


def test_tensors_that_somebody_quantized_and_llama_quantize_would_not_are_told(tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType

    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.ffn_gate_inp.weight", np.zeros((2, 68), np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_norm.weight", np.zeros(64, np.float32))
    writer.add_tensor("output.weight", np.zeros((2, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = open_scheme(tmp_path / "m.gguf")
    assert dict(opened.scheme.types) == {"output.weight": "F16"}
    assert quantized_beyond(opened) == {"blk.0.ffn_gate_inp.weight": "Q8_0"}


def test_shares_of_types_add_up_to_the_data(model: Path) -> None:
    opened = open_scheme(model)
    types = {**opened.scheme.types, "output.weight": "Q8_0"}
    of_types = shares(types, opened.shapes)
    assert [(share.type, share.n_tensors) for share in of_types] == [("Q8_0", 1), ("F16", len(types) - 1)]
    assert of_types[0].nbytes == 320 * 64 * 34 // 32
    assert sum(share.n_weights or 0 for share in of_types) == sum(t.n_elements for t in opened.shapes.values())
    assert shares(types, {})[0].nbytes is None


def scheme_file(path: Path, **types: str) -> Path:
    write_scheme(Scheme({name.replace("__", "."): one for name, one in types.items()}, path.stem), path)
    return path


def test_differences_are_grouped_by_kind_types_and_ranges(model: Path, tmp_path: Path) -> None:
    reference = open_scheme(model)
    types = dict(reference.scheme.types)
    types |= {f"blk.{i}.attn_q.weight": "Q8_0" for i in (0, 1, 3)} | {"output.weight": "Q8_0"}
    del types["blk.2.ffn_up.weight"]
    types["blk.4.ffn_up.weight"] = "Q4_0"
    write_scheme(replace(reference.scheme, types=types, predicted_kld=0.5), tmp_path / "b.toml")
    found = compare(reference, open_scheme(tmp_path / "b.toml"))
    assert found.changes() == [
        Change("output.weight", "", 1, "F16", "Q8_0"),
        Change("attn_q.weight", "0-1, 3", 3, "F16", "Q8_0"),
    ]
    assert found.only == {"a": ["blk.2.ffn_up.weight"], "b": ["blk.4.ffn_up.weight"]}
    assert found.n_same == len(reference.scheme.types) - 5
    assert found.types["blk.3.attn_q.weight"] == ("F16", "Q8_0")
    assert found.a.nbytes == sum(t.nbytes for t in reference.shapes.values())
    assert found.a.bpw == 16
    # B names a tensor whose shape nobody knows.
    assert (found.b.nbytes, found.b.bpw) == (None, None)
    assert found.b.scheme.predicted_kld == 0.5


def test_the_shapes_of_a_gguf_serve_for_the_other_side_too(model: Path, tmp_path: Path) -> None:
    reference = open_scheme(model)
    all_q8 = replace(reference.scheme, types=dict.fromkeys(reference.scheme.types, "Q8_0"))
    write_scheme(all_q8, tmp_path / "b.toml")
    assert compare(open_scheme(tmp_path / "b.toml"), reference).a.bpw == 8.5


def test_rules_are_applied_to_the_tensors_of_the_other_side(model: Path, tmp_path: Path) -> None:
    text = '[scheme]\nformat = 1\n[types]\ndefault = "F16"\n"blk.*.attn_k.weight" = "Q4_0"\n'
    (tmp_path / "short.toml").write_text(text)
    short = open_scheme(tmp_path / "short.toml")
    found = compare(short, open_scheme(model))
    assert found.changes() == [Change("attn_k.weight", "0-3", 4, "Q4_0", "F16")]
    with pytest.raises(UsageError, match="both have rules"):
        compare(short, short)
    assert compare(short, short, quantizable(read_header(model))).n_same == len(open_scheme(model).scheme.types)


def test_equal_schemes_do_not_differ(tmp_path: Path) -> None:
    a = open_scheme(scheme_file(tmp_path / "a.toml", output__weight="Q4_K"))
    b = open_scheme(scheme_file(tmp_path / "b.toml", output__weight="Q4_K"))
    found = compare(a, b)
    assert (found.types, found.changes(), found.n_same) == ({}, [], 1)
    assert render(found.a.scheme) != render(found.b.scheme)
