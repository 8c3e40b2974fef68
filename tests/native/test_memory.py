"""The planner's bytes beside llama.cpp's own, of models of every kind of cache, without their weights.

llama.cpp loads a sparse file with ``no_alloc``: it reads the header, makes every tensor and buffer in name, and says in
its log how large they would be.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dynrun.gguf.header import read_header
from dynrun.gguf.layout import quantized_file_bytes
from dynrun.llamacpp.library import llama
from dynrun.llamacpp.tools import quantize_dry_run
from dynrun.runtime.memory import cache_bytes, compute_bytes
from dynrun.runtime.model_facts import ModelFacts, facts_of
from dynrun.runtime.placement import Choice
from tests.shapes import NAMES, PRESETS, dry_run, preset_types, write_sparse
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
MIB = 1 << 20
# ggml_type of the cache.
F16, Q8_0 = 1, 8


def log_of(path: Path, choice: Choice, cache_type: int = F16) -> str:
    """What llama.cpp says while it makes a context as llama-server does, with nothing allocated."""
    lib, lines = llama(), list[str]()

    @lib.llama_log_callback  # type: ignore[untyped-decorator]
    def collect(level: int, text: bytes, data: object) -> None:
        lines.append(text.decode("utf-8", "replace"))

    lib.llama_log_set(collect, None)
    try:
        params = lib.llama_model_default_params()
        params.no_alloc, params.load_mode, params.use_extra_bufts = True, 0, False
        model = lib.llama_model_load_from_file(str(path).encode(), params)
        assert model, "".join(lines)[-2000:]
        wanted = lib.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max = choice.n_ctx * choice.parallel, choice.parallel
        wanted.n_batch, wanted.n_ubatch, wanted.n_outputs_max = 2048, 512, choice.parallel
        wanted.type_k = wanted.type_v = cache_type
        wanted.swa_full = False
        context = lib.llama_init_from_model(model, wanted)
        assert context, "".join(lines)[-2000:]
        lib.llama_free(context)
        lib.llama_model_free(model)
    finally:
        lib.llama_log_set(lib.llama_log_callback(), None)
    return "".join(lines)


def mebibytes(log: str, what: str) -> float:
    return sum(map(float, re.findall(rf"{what} *= +([\d.]+) MiB", log)))


def check(facts: ModelFacts, log: str, choice: Choice) -> None:
    caches = sum(cache_bytes(layer.cache, choice) for layer in facts.layers)
    said = mebibytes(log, "llama_kv_cache: size") + mebibytes(log, "llama_memory_recurrent: size")
    assert caches / MIB == pytest.approx(said, abs=0.02)
    assert compute_bytes(facts, choice) / MIB == pytest.approx(mebibytes(log, "compute buffer size"), rel=0.15)


CHOICES = (Choice(4096), Choice(65536), Choice(16384, 4))


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: f"{choice.n_ctx}x{choice.parallel}")
@pytest.mark.parametrize("name", NAMES)
def test_caches_are_llama_cpps_to_the_byte(name: str, choice: Choice, tmp_path: Path) -> None:
    path = write_sparse(tmp_path / f"{name}.gguf", name, "Q8_0")
    check(facts_of(read_header(path)), log_of(path, choice), choice)


def test_quantized_caches_are_too(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "g.gguf", "gemma-3-27b", "Q8_0")
    choice = Choice(32768, type_k="q8_0", type_v="q8_0")
    check(facts_of(read_header(path)), log_of(path, choice, Q8_0), choice)


def test_a_small_model_with_an_odd_context_is_too(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "t.gguf")
    choice = Choice(700)
    log = log_of(path, choice)
    caches = sum(cache_bytes(layer.cache, choice) for layer in facts_of(read_header(path)).layers)
    assert caches / MIB == pytest.approx(mebibytes(log, "llama_kv_cache: size"), abs=0.01)


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_the_written_down_presets_are_llama_quantizes(name: str, preset: str, tmp_path: Path) -> None:
    types = preset_types(name, preset)
    for kind, runs in dry_run(name, preset, tmp_path).items():
        for first, last, type_name in runs:
            names = [f"blk.{layer}.{kind}" for layer in range(first, last + 1)]
            assert {types.get(tensor) for tensor in names if tensor in types} <= {type_name}
            assert kind in types or all(tensor in types for tensor in names)


@pytest.mark.parametrize(("preset", "gib"), [("Q3_K_M", 12.51), ("Q4_K_M", 15.41), ("Q6_K", 20.64), ("Q8_0", 26.74)])
def test_gemma_3_27b_will_have_the_size_of_the_published_files(preset: str, gib: float, tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "gemma.gguf", "gemma-3-27b", "F16")
    types = quantize_dry_run(path, preset, imatrix=None).types
    planned = quantized_file_bytes(read_header(path), types, {}, ())
    assert planned / (1 << 30) == pytest.approx(gib, rel=0.01)
