"""A quantized GGUF as reference: unpacked to its own values, and everything made of it says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dynrun.errors import UsageError
from dynrun.gguf.header import read_header
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp import tools
from dynrun.llamacpp.library import ggml
from dynrun.models import open_reference
from tests.commands import dynrun
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native


@pytest.fixture
def coarse(tmp_path: Path) -> Path:
    write_tiny_llama(tmp_path / "tiny.gguf", n_block=1, n_vocab=512)
    tools.quantize(tmp_path / "tiny.gguf", "tiny-Q4_K_M.gguf", "Q4_K_M", folder=tmp_path, n_threads=1)
    return tmp_path / "tiny-Q4_K_M.gguf"


def test_a_quantized_reference_has_the_files_own_values(coarse: Path) -> None:
    reference = open_reference(str(coarse))
    assert reference.quantized == "Q4_K_M"
    assert reference.name == coarse.stem
    source, got = read_header(coarse), WeightFile(reference.path)
    assert {t.type for t in got.header.tensors.values()} == {"F16", "F32"}
    assert {n: t.shape for n, t in got.header.tensors.items()} == {n: t.shape for n, t in source.tensors.items()}
    tensor = source.tensors["blk.0.ffn_down.weight"]
    raw = np.memmap(coarse, dtype=np.uint8)[source.data_offset + tensor.offset :][: tensor.nbytes]
    from dynrun.gguf.tensor_types import TENSOR_TYPES

    wanted = ggml().dequantize(TENSOR_TYPES[tensor.type].ggml_id, np.array(raw), tensor.shape[1], tensor.shape[0])
    assert np.array_equal(got.rows(tensor.name), wanted.astype(np.float16).astype(np.float32))
    assert open_reference(str(coarse)).sha256 == reference.sha256


def test_what_is_made_of_it_says_so_in_table_report_and_metadata(coarse: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "out.gguf"
    small = ("--tokens", "512", "--ctx", "128", "--probe-tokens", "64", "--eval-tokens", "256", "--candidates", "0")
    ran = dynrun("make", coarse, "--quant", "Q2_K", *small, "--no-feedback", "--out", out)
    assert ran.exit_code == 0, ran.stderr
    warning = "the reference is itself quantized (Q4_K_M): divergences are from that file, not from the model"
    assert f"Mind: {warning}." in " ".join(ran.stdout.split())
    assert f"mind: {warning}" in ran.stderr
    report = out.with_name("out.report")
    # Markdown and HTML have their own characters escaped.
    assert warning in (report / "README.md").read_text(encoding="utf-8").replace("\\", "")
    assert "divergences are from that file" in next(report.glob("*.html")).read_text(encoding="utf-8")
    assert read_header(out).metadata["dynrun.reference.quantized"] == "Q4_K_M"


def test_shards_of_a_quantized_file_are_refused(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "tiny.gguf", n_block=1, n_vocab=8192)
    tools.quantize(tmp_path / "tiny.gguf", "coarse.gguf", "Q8_0", folder=tmp_path, n_threads=1)
    shards = tools.split_file(tmp_path / "coarse.gguf", tmp_path / "shard", max_size="3M")
    with pytest.raises(UsageError, match="quantized file in shards"):
        open_reference(str(min(shards)))
