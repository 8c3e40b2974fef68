"""Where the planner says that layers and buffers lie, beside where llama.cpp puts them on two RPC devices."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynrun.gguf.header import read_header
from dynrun.llamacpp.devices import resolve
from dynrun.llamacpp.library import llama
from dynrun.runtime.memory import cache_bytes
from dynrun.runtime.model_facts import facts_of
from dynrun.runtime.placement import Choice
from dynrun.runtime.residence import CPU, ledger, residence
from tests.rpc import rpc_server
from tests.shapes import write_sparse

pytestmark = pytest.mark.native
MIB = 1 << 20


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    folder = tmp_path_factory.mktemp("rpc")
    with rpc_server(folder / "one") as (one, _), rpc_server(folder / "other") as (other, _):
        yield one, other


def log_of(path: Path, choice: Choice, specs: tuple[str, ...]) -> tuple[list[str], str]:
    """The devices' names, and what llama.cpp says of a model with its layers dealt out as ``choice`` has them, with
    nothing allocated."""
    lib, lines = llama(), list[str]()

    @lib.llama_log_callback  # type: ignore[untyped-decorator]
    def collect(level: int, text: bytes, data: object) -> None:
        lines.append(text.decode("utf-8", "replace"))

    devices = [resolve(spec) for spec in specs]
    handles = (ctypes.c_void_p * (len(specs) + 1))(*(device.handle for device in devices), None)
    split = (ctypes.c_float * 128)(*choice.layers_of)
    lib.llama_log_set(collect, None)
    try:
        params = lib.llama_model_default_params()
        params.no_alloc, params.load_mode, params.use_extra_bufts = True, 0, False
        params.n_gpu_layers, params.devices = choice.n_gpu_layers, ctypes.addressof(handles)
        params.tensor_split = ctypes.cast(split, ctypes.POINTER(ctypes.c_float))
        model = lib.llama_model_load_from_file(str(path).encode(), params)
        assert model, "".join(lines)[-2000:]
        wanted = lib.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max = choice.n_ctx * choice.parallel, choice.parallel
        wanted.n_batch, wanted.n_ubatch, wanted.n_outputs_max, wanted.swa_full = 2048, 512, choice.parallel, False
        context = lib.llama_init_from_model(model, wanted)
        assert context, "".join(lines)[-2000:]
        lib.llama_free(context)
        lib.llama_model_free(model)
    finally:
        lib.llama_log_set(lib.llama_log_callback(), None)
    return [device.name for device in devices], "".join(lines)


CASES = (
    *(("gemma-3-27b", (0.3, 0.5)), ("gemma-3-27b", (0.7, 0.3)), ("gpt-oss-120b", (0.7, 0.3))),
    *(("gpt-oss-120b", (0.1, 0.05)), ("lfm2-1.2b", (0.3, 0.5)), ("lfm2-1.2b", (0.1, 0.05))),
)


@pytest.mark.parametrize(("name", "shares"), CASES)
def test_layers_and_buffers_lie_where_they_are_planned(
    name: str, shares: tuple[float, float], specs: tuple[str, str], tmp_path: Path
) -> None:
    path = write_sparse(tmp_path / "m.gguf", name, "Q8_0")
    facts = facts_of(read_header(path))
    first = max(round(facts.n_layer * shares[0]), 1)
    second = facts.n_layer + 1 - first if sum(shares) == 1 else max(round(facts.n_layer * shares[1]), 1)
    choice = Choice(8192, n_gpu_layers=first + second, layers_of=(first, second))
    names, log = log_of(path, choice, specs)
    where = residence(facts, choice)

    assigned = re.findall(r"layer +(\d+) assigned to device ([^,\s]+)", log)
    said = {int(number): names.index(device) if device in names else CPU for number, device in assigned}
    assert said == dict(enumerate([*where.layer_on, where.output_on]))

    books = ledger(facts, choice, where, discrete=False)
    for index, spec in enumerate(specs):
        (compute,) = re.findall(rf"RPC\S*{re.escape(spec[4:])}\S* compute buffer size = +([\d.]+) MiB", log)
        assert books.compute[index] / MIB == pytest.approx(float(compute), rel=0.2)
    (compute,) = re.findall(r"CPU compute buffer size = +([\d.]+) MiB", log)
    assert books.compute[CPU] / MIB == pytest.approx(float(compute), rel=0.2)
    everything = sum(cache_bytes(layer.cache, choice) for layer in facts.layers)
    assert sum(books.caches.values()) == everything
