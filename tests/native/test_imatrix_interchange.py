"""Imatrix files between dynrun and stock llama.cpp: its own programs are the oracles."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dynrun.calibration.experts import shrink_experts
from dynrun.calibration.imatrix import Imatrix, load_imatrix, merge, read_imatrix, write_imatrix
from dynrun.calibration.imatrix_stats import TensorStatistics, layer_statistics, statistics
from dynrun.errors import UsageError
from dynrun.gguf.header import read_header
from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp import tools
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.library import ggml
from dynrun.llamacpp.process import scrubbed_environment
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
N_EXPERT = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models ``0.gguf`` (dense) and ``4.gguf`` (experts), and imatrices of each by llama-imatrix of two texts."""
    made = tmp_path_factory.mktemp("interchange")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNRUN_CACHE", str(made / "cache"))
        for n_expert in (0, N_EXPERT):
            model = write_tiny_llama(made / f"{n_expert}.gguf", n_expert=n_expert)
            for name, text in {"a": "The quick brown fox. " * 30, "b": "0123456789, and so on; " * 20}.items():
                (made / f"{name}.txt").write_text(text)
                out = made / f"{n_expert}-{name}.gguf"
                tools.collect_imatrix(model, made / f"{name}.txt", out, n_ctx=64, n_threads=1, parse_special=False)
    return made


def llama_imatrix(*arguments: str | Path) -> str:
    """What it prints; it wants the name of a model, and opens none here."""
    argv = (installation().program("llama-imatrix"), "-m", "none.gguf", *arguments)
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=scrubbed_environment())
    return done.stdout + done.stderr


def combined(out: Path, *files: Path, dat: bool = False) -> Path:
    llama_imatrix("--in-file", ",".join(map(str, files)), "-o", out, "--output-format", "dat" if dat else "gguf")
    return out


def shapes(model: Path) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in read_header(model).tensors.items()}


def assert_same(a: Imatrix, b: Imatrix) -> None:
    assert set(a.sums) == set(b.sums)
    for name in a.sums:
        assert np.array_equal(a.counts[name], b.counts[name]), name
        np.testing.assert_allclose(a.sums[name], b.sums[name], rtol=1e-6, err_msg=name)


def assert_same_means(a: Imatrix, b: Imatrix) -> None:
    assert set(a.sums) == set(b.sums)
    for name in a.sums:
        ours, theirs = a.mean(name), b.mean(name)
        assert ours is not None
        assert theirs is not None
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=name)


# -- merging and the legacy format -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_expert", [0, N_EXPERT])
def test_merging_is_llama_imatrixs_combining(folder: Path, tmp_path: Path, n_expert: int) -> None:
    files = [folder / f"{n_expert}-{name}.gguf" for name in "ab"]
    theirs = read_imatrix(combined(tmp_path / "c.gguf", *files))
    merged = merge([read_imatrix(path) for path in files])
    assert_same(merged, theirs)
    assert merged.datasets == theirs.datasets


@pytest.mark.parametrize("n_expert", [0, N_EXPERT])
def test_a_legacy_file_says_what_it_was_made_from(folder: Path, tmp_path: Path, n_expert: int) -> None:
    origin = folder / f"{n_expert}-a.gguf"
    legacy = combined(tmp_path / "a.dat", origin, dat=True)
    read = load_imatrix(legacy, shapes(folder / f"{n_expert}.gguf"))
    assert_same_means(read, read_imatrix(origin))
    assert read.datasets == read_imatrix(origin).datasets
    assert_same(load_imatrix(legacy), read_imatrix(combined(tmp_path / "back.gguf", legacy)))


@pytest.mark.parametrize("n_expert", [0, N_EXPERT])
@pytest.mark.parametrize("legacy_first", [True, False])
def test_legacy_files_are_weighed_as_llama_imatrix_does(
    folder: Path, tmp_path: Path, n_expert: int, legacy_first: bool
) -> None:
    files = [combined(tmp_path / "a.dat", folder / f"{n_expert}-a.gguf", dat=True), folder / f"{n_expert}-b.gguf"]
    files = files if legacy_first else files[::-1]
    theirs = read_imatrix(combined(tmp_path / "c.gguf", *files))
    assert_same(merge([load_imatrix(path) for path in files]), theirs)


def test_an_expert_without_tokens_is_none_again_after_the_legacy_format(folder: Path, tmp_path: Path) -> None:
    name = "blk.0.ffn_up_exps.weight"
    origin = without_tokens(read_imatrix(folder / f"{N_EXPERT}-a.gguf"), name, expert=1)
    write_imatrix(origin, tmp_path / "a.gguf")
    read = load_imatrix(
        combined(tmp_path / "a.dat", tmp_path / "a.gguf", dat=True), shapes(folder / f"{N_EXPERT}.gguf")
    )
    assert (read.counts[name] > 0).tolist() == [True, False, True, True]
    assert_same_means(read, origin)


def test_an_imatrix_of_another_model_is_refused(folder: Path) -> None:
    wider = write_tiny_llama(folder / "wide.gguf", n_embd=512, n_block=1)
    with pytest.raises(UsageError, match="was made for another model"):
        load_imatrix(folder / "0-a.gguf", shapes(wider))
    assert load_imatrix(folder / "0-a.gguf", shapes(folder / "0.gguf")).sums


# -- experts -----------------------------------------------------------------------------------------------------------


def without_tokens(imatrix: Imatrix, name: str, *, expert: int) -> Imatrix:
    """The same, one expert of ``name`` never met."""
    keep = np.arange(len(imatrix.counts[name])) != expert
    sums = {**imatrix.sums, name: imatrix.sums[name] * keep[:, None]}
    return Imatrix(sums, {**imatrix.counts, name: imatrix.counts[name] * keep}, imatrix.datasets, 1, 64)


@pytest.mark.parametrize("ftype", ["IQ2_XXS", "Q2_K"])
def test_llama_quantize_uses_the_layers_mean_for_an_expert_without_tokens(
    folder: Path, tmp_path: Path, ftype: str
) -> None:
    model, name = folder / f"{N_EXPERT}.gguf", "blk.0.ffn_up_exps.weight"
    raw = without_tokens(read_imatrix(folder / f"{N_EXPERT}-a.gguf"), name, expert=1)
    write_imatrix(shrink_experts(raw, int(raw.counts[name].max())), tmp_path / "i.gguf")
    mean = read_imatrix(tmp_path / "i.gguf").mean(name)
    assert mean is not None
    np.testing.assert_allclose(mean[1], raw.sums[name].sum(axis=0) / raw.counts[name].sum(), rtol=1e-6)

    tools.write_tensor_types({name: ftype}, tmp_path / "types")
    tools.quantize(model, "out.gguf", ftype, folder=tmp_path, n_threads=1, imatrix="i.gguf", tensor_type_file="types")
    made = read_header(tmp_path / "out.gguf")
    tensor = made.tensors[name]
    assert tensor.type == ftype
    data = (tmp_path / "out.gguf").read_bytes()[made.data_offset + tensor.offset :][: tensor.nbytes]
    assert data == quantized(model, name, ftype, mean)
    assert data != quantized(model, name, ftype, np.where(np.arange(N_EXPERT)[:, None] == 1, 1.0, mean))


def quantized(model: Path, name: str, type_name: str, mean: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> bytes:
    """All experts of a tensor by ggml_quantize_chunk, each with its own row of ``mean``."""
    rows, type_id = WeightFile(model).rows(name), TENSOR_TYPES[type_name].ggml_id
    ggml().ggml_quantize_init(type_id)
    parts = zip(np.split(rows, len(mean)), mean.astype(np.float32), strict=True)
    return b"".join(ggml().quantize(type_id, values, importance).tobytes() for values, importance in parts)


def test_llama_imatrix_reads_a_file_with_shrunk_experts(folder: Path, tmp_path: Path) -> None:
    shrunk = shrink_experts(read_imatrix(folder / f"{N_EXPERT}-a.gguf"), 100_000)
    write_imatrix(shrunk, tmp_path / "i.gguf")
    assert "dynrun.expert_tokens.blk.0.ffn_up_exps.weight" in read_header(tmp_path / "i.gguf").metadata
    assert_same_statistics(tmp_path / "i.gguf")


# -- statistics --------------------------------------------------------------------------------------------------------

_NUMBER = r" *(-?[\d.]+)%?"
_TENSOR = re.compile(r" I +(\S+)\t(\S+) *\t" + r"\t".join([_NUMBER] * 11) + "$", re.M)
_LAYER = re.compile(r" I +(\d+)\t" + r"\t".join([_NUMBER] * 3) + "$", re.M)
_DECIMALS = (2, 4, 4, 2, 2, 2, 0, 4, 2, 2, 4)
_TRIES = 300


def shown_statistics(path: Path) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """The rows of both tables. On a busy machine most runs end before the logger has written anything, by design
    (common/log.cpp, common_log_main): a run takes milliseconds, so ask until both tables are whole."""
    for _ in range(_TRIES):
        printed = llama_imatrix("--in-file", path, "--show-statistics")
        tensors, layers = _TENSOR.findall(printed), _LAYER.findall(printed)
        if f"({len(tensors)} tensors)" in printed and f"({len(layers)} layers)" in printed:
            return tensors, layers
    raise AssertionError(f"llama-imatrix showed no whole statistics in {_TRIES} runs: {printed}")


def as_shown(row: TensorStatistics) -> list[float]:
    spread = [row.total, row.least, row.greatest, row.mean, row.stddev, 100 * row.active, row.n]
    return [*spread, row.entropy, 100 * row.entropy_share, 100 * row.zd, row.cos_sim]


def assert_same_statistics(path: Path) -> None:
    """Each number as printed, to one in its last digit."""
    theirs, their_layers = shown_statistics(path)
    rows = statistics(read_imatrix(path))
    # Equal totals come in no order of their own.
    assert [kind for _, kind, *_ in theirs] == [row.tensor for row in rows]
    expected = {(layer, kind): values for layer, kind, *values in theirs}
    for row in rows:
        other = expected["-" if row.block is None else str(row.block), row.tensor]
        difference = np.abs(np.array(as_shown(row)) - np.array(other, dtype=float))
        assert (difference <= 1.001 * 10.0 ** -np.array(_DECIMALS)).all(), row.weight

    layers = np.array([(x.block, x.total, 100 * x.zd, x.cos_sim) for x in layer_statistics(rows)])
    assert layers.size
    assert (np.abs(layers - np.array(their_layers, dtype=float)) <= [0, 0.011, 1.1e-4, 1.1e-4]).all()


@pytest.mark.parametrize("n_expert", [0, N_EXPERT])
def test_statistics_are_those_that_llama_imatrix_shows(folder: Path, n_expert: int) -> None:
    assert_same_statistics(folder / f"{n_expert}-a.gguf")


def test_statistics_leave_out_experts_without_tokens_as_llama_imatrix_does(folder: Path, tmp_path: Path) -> None:
    raw = without_tokens(read_imatrix(folder / f"{N_EXPERT}-a.gguf"), "blk.0.ffn_up_exps.weight", expert=1)
    write_imatrix(raw, tmp_path / "i.gguf")
    assert_same_statistics(tmp_path / "i.gguf")
