"""Shards: proved, small enough, and a model to llama.cpp; schemes that no file can be made of are refused before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from dynrun.calibration.imatrix import Imatrix, write_imatrix
from dynrun.calibration.stage import ImatrixStage, import_imatrix
from dynrun.errors import DoesNotFitError, UsageError
from dynrun.gguf.header import read_header
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.shards import read_shards, read_whole_header
from dynrun.llamacpp.engine import Engine
from dynrun.llamacpp.process import ToolError
from dynrun.models import Reference, open_reference
from dynrun.quantize import Quantized, check_scheme, make_from_scheme, scheme_bytes, shard_overhead_bytes, split
from dynrun.scheme import Scheme
from tests.commands import dynrun
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
MAX_BYTES = 1_100_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", n_block=4)


@pytest.fixture
def reference(model: Path) -> Reference:
    return open_reference(str(model))


@pytest.fixture
def imatrix_file(reference: Reference, tmp_path: Path) -> Path:
    """An entry for every weight but the output."""
    shapes = {name: tensor.shape for name, tensor in quantizable(reference.header).items() if name != "output.weight"}
    sums = {name: np.ones((1, shape[0])) for name, shape in shapes.items()}
    imatrix = Imatrix(sums, {name: np.ones(1) for name in sums})
    write_imatrix(imatrix, tmp_path / "i.gguf", dataset="x", chunk_count=1, chunk_size=512)
    return tmp_path / "i.gguf"


@pytest.fixture
def imatrix(reference: Reference, imatrix_file: Path) -> ImatrixStage:
    return import_imatrix(reference, [imatrix_file], min_expert_tokens=0)


@pytest.fixture
def scheme(reference: Reference) -> Scheme:
    types = dict.fromkeys(quantizable(reference.header), "Q8_0") | {"blk.1.ffn_up.weight": "F16"}
    return Scheme(types, "mine")


def make(reference: Reference, scheme: Scheme, imatrix: ImatrixStage, split_max_size: int | None = None) -> Quantized:
    return make_from_scheme(
        reference, scheme, imatrix, n_threads=1, on_tensor=lambda _d, _t: None, split_max_size=split_max_size
    )


def logits(path: Path) -> npt.NDArray[np.float32]:
    with Engine.open(path, n_ctx=64, n_threads=1) as engine:
        return engine.logits([5, 70, 71, 200, 9, 33])


def test_shards_are_a_model_to_llama_cpp_with_the_same_answers(
    reference: Reference, scheme: Scheme, imatrix: ImatrixStage, tmp_path: Path
) -> None:
    made = make(reference, scheme, imatrix, MAX_BYTES)
    shards = split(made.path, tmp_path / "out" / "tiny [1]", MAX_BYTES)
    n = len(shards)
    assert n > 2
    assert sorted((tmp_path / "out").iterdir()) == shards
    assert [path.name for path in shards] == [f"tiny [1]-{i + 1:05d}-of-{n:05d}.gguf" for i in range(n)]
    sizes = [path.stat().st_size for path in shards]
    assert max(sizes) <= MAX_BYTES
    over = shard_overhead_bytes(reference, imatrix, scheme.label, made.size_bytes, MAX_BYTES)
    assert made.size_bytes < sum(sizes) <= made.size_bytes + over
    assert over < 2000
    whole, given = read_whole_header(shards[1]), read_header(made.path)
    assert {name: (t.type, t.shape) for name, t in whole.tensors.items()} == {
        name: (t.type, t.shape) for name, t in given.tensors.items()
    }
    assert whole.metadata == given.metadata
    assert np.array_equal(logits(shards[0]), logits(made.path))


def test_the_bytes_of_every_tensor_are_in_the_shards(
    reference: Reference, scheme: Scheme, imatrix: ImatrixStage, tmp_path: Path
) -> None:
    made = make(reference, scheme, imatrix)
    split(made.path, tmp_path / "t", MAX_BYTES)

    def tensors(first: Path) -> dict[str, bytes]:
        found = {}
        for header in read_shards(first):
            data = header.path.read_bytes()
            for name, tensor in header.tensors.items():
                start = header.data_offset + tensor.offset
                found[name] = data[start : start + tensor.nbytes]
        return found

    assert tensors(min(tmp_path.glob("t-*.gguf"))) == tensors(made.path)


def test_a_file_that_fits_is_left_whole(
    reference: Reference, scheme: Scheme, imatrix: ImatrixStage, tmp_path: Path
) -> None:
    made = make(reference, scheme, imatrix, 10**9)
    assert split(made.path, tmp_path / "tiny", made.size_bytes) == [tmp_path / "tiny.gguf"]
    assert (tmp_path / "tiny.gguf").read_bytes() == made.path.read_bytes()
    assert shard_overhead_bytes(reference, imatrix, "mine", made.size_bytes, made.size_bytes) == 0


def test_shards_too_small_for_a_tensor_are_refused_before_and_after_with_the_smallest_possible(
    reference: Reference, scheme: Scheme, imatrix: ImatrixStage, tmp_path: Path
) -> None:
    with pytest.raises(DoesNotFitError, match=r"the smallest possible --split-max-size is \d+") as caught:
        make(reference, scheme, imatrix, 1_000_000)
    smallest = int(str(caught.value).split()[-1])
    made = make(reference, scheme, imatrix, smallest)
    assert all(path.stat().st_size <= smallest for path in split(made.path, tmp_path / "ok", smallest))
    with pytest.raises(DoesNotFitError, match=f"is {smallest}"):
        split(made.path, tmp_path / "no", smallest - 1)
    assert not [path for path in tmp_path.iterdir() if path.name.lstrip(".").startswith("no")]


def test_a_failure_leaves_no_shard_and_what_was_there_before(
    reference: Reference, scheme: Scheme, imatrix: ImatrixStage, tmp_path: Path
) -> None:
    made = make(reference, scheme, imatrix)
    before = split(made.path, tmp_path / "out" / "t", MAX_BYTES)
    kept = {path: path.read_bytes() for path in before}
    damaged = tmp_path / "damaged.gguf"
    # A key that llama-gguf-split knows, of a type that it refuses.
    damaged.write_bytes(made.path.read_bytes().replace(b"general.architecture", b"general.alignment\0\0\0"))
    with pytest.raises(ToolError, match="llama-gguf-split failed"):
        split(damaged, tmp_path / "out" / "t", MAX_BYTES)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == kept


def test_a_scheme_that_does_not_fit_the_model_is_refused_with_a_way_out(
    reference: Reference, scheme: Scheme, imatrix: ImatrixStage, tmp_path: Path
) -> None:
    def refused(types: dict[str, str], match: str) -> None:
        with pytest.raises(UsageError, match=match):
            make(reference, replace(scheme, types={**scheme.types, **types}), imatrix)

    refused({"blk.7.attn_q.weight": "Q4_K"}, r"names blk\.7\.attn_q\.weight, which the model has not")
    refused({"output.weight": "IQ2_XXS"}, r"gives output\.weight IQ2_XXS, which needs an imatrix entry — give IQ1_M")
    narrow = open_reference(str(write_tiny_llama(tmp_path / "n.gguf", n_embd=64, n_ff=64, n_block=1)))
    types = dict.fromkeys(quantizable(narrow.header), "Q8_0")
    q4_k = {"output.weight": "Q4_K", "blk.0.attn_q.weight": "Q4_K"}
    with pytest.raises(UsageError, match=r"\(and 1 more like it\) Q4_K, which is for rows of multiples of 256, not 64"):
        check_scheme(narrow, Scheme({**types, **q4_k}, "mine"))
    with pytest.raises(UsageError, match=r"gives no type to output\.weight"):
        check_scheme(narrow, Scheme({n: t for n, t in types.items() if n != "output.weight"}, "mine"))
    check_scheme(narrow, Scheme(types, "mine"))
    assert scheme_bytes(reference, scheme, imatrix) == make(reference, scheme, imatrix).path.stat().st_size


def test_quantize_writes_shards_from_a_short_scheme(model: Path, imatrix_file: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.toml"
    short.write_text('[scheme]\nformat = 1\n[types]\ndefault = "Q8_0"\n"blk.*.ffn_up.weight" = "Q6_K"\n')
    out = tmp_path / "shards" / "tiny.gguf"
    ran = dynrun(
        "quantize", model, short, "--out", out, "--split-max-size", "1.1M", "--imatrix", imatrix_file, "--json"
    )
    assert ran.exit_code == 0, ran.stderr
    paths = list(map(Path, ran.json["paths"]))
    assert ran.json["path"] == str(out.with_name(f"tiny-00001-of-{len(paths):05d}.gguf"))
    assert sorted(out.parent.iterdir()) == paths
    assert ran.json["size_bytes"] == sum(path.stat().st_size for path in paths)
    header = read_whole_header(paths[0])
    assert header.tensors["blk.3.ffn_up.weight"].type == "Q6_K"
    assert header.metadata["dynrun.label"] == "short"
