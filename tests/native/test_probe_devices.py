"""Probes on named devices: the CPU, workers, and llama.cpp's RPC server on this machine."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from dynrun.calibration.imatrix import Imatrix, read_imatrix, write_imatrix
from dynrun.calibration.sequences import TokenSequence
from dynrun.errors import DynrunError, NetworkError, UsageError
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.weights import WeightFile, encode
from dynrun.llamacpp.devices import devices, resolve
from dynrun.llamacpp.engine import Engine
from dynrun.sensitivity.errors import Quantizer
from dynrun.sensitivity.sweep import Job, Probe, Sweep
from dynrun.sensitivity.workers import WORKER, ProbePool
from tests.rpc import rpc_server
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
TOKENS = (5, 70, 71, 200, 9, 33, 120, 121, 4, 4, 250, 17, 60, 61, 62, 63)
SEQUENCES = [TokenSequence("a", "chat", TOKENS), TokenSequence("b", "chat", TOKENS[::-1])]
JOBS = [
    Job("v", {"blk.1.attn_v.weight": "Q3_K"}, 0, 2),
    Job("down", {"blk.0.ffn_down.weight": "Q4_K"}, 1, 2),
    Job("embedding", {"token_embd.weight": "Q3_K"}, 0, 1),
    Job("two", {"blk.0.attn_q.weight": "Q3_K", "blk.1.ffn_up.weight": "Q5_K"}, 0, 2),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def imatrix(model: Path) -> Path:
    random, path = np.random.default_rng(0), model.with_name("imatrix.gguf")
    sums = {t.name: random.random((1, t.shape[0])) + 0.1 for t in quantizable(WeightFile(model).header).values()}
    write_imatrix(Imatrix(sums, {name: np.ones(1) for name in sums}), path)
    return path


def sweep(model: Path, imatrix: Path, device: str) -> tuple[int, list[Probe]]:
    quantizer = Quantizer(WeightFile(model), read_imatrix(imatrix), 2)
    with Engine.open(model, n_ctx=64, n_threads=2, device=device) as engine:
        sweep = Sweep(engine, quantizer, SEQUENCES)
        return sweep.furthest, [sweep.run(job) for job in JOBS]


def pooled(
    model: Path, imatrix: Path, names: Sequence[str], jobs: Sequence[Job] = JOBS, lost: list[DynrunError] | None = None
) -> Iterator[Probe]:
    told = [] if lost is None else lost
    with ProbePool(model, imatrix, SEQUENCES, n_ctx=64, n_threads=2, devices=names, on_lost=told.append) as pool:
        yield from pool.run(jobs)


def results(probes: Sequence[Probe] | Iterator[Probe]) -> list[tuple[str, list[float], list[float], list[int]]]:
    """What must not depend on who measured it."""
    return sorted((p.name, p.errors, p.klds, p.weights) for p in probes)


def test_the_cpu_is_a_device_whatever_else_there_is() -> None:
    cpu = resolve("cpu")
    assert cpu in devices()
    assert cpu.kind == "cpu"
    assert cpu.total_bytes > 0


def test_an_unknown_device_is_told_with_those_there_are(model: Path) -> None:
    with pytest.raises(UsageError, match=r"no device 'CUDA99' — there are .*CPU"):
        Engine.open(model, n_ctx=64, n_threads=1, device="CUDA99")


def test_an_rpc_server_that_is_not_there_is_a_network_error(model: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        with pytest.raises(NetworkError, match=f"no llama.cpp RPC server at 127.0.0.1:{port}"):
            Engine.open(model, n_ctx=64, n_threads=1, device=f"rpc:127.0.0.1:{port}")


def test_another_server_is_no_rpc_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynrun.llamacpp.devices._ANSWER_S", 0.2)
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, pytest.raises(NetworkError, match="one program at a time"):
        resolve(f"rpc:127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize("tied", [False, True])
def test_probes_over_rpc_equal_local_ones(tied: bool, imatrix: Path, tmp_path: Path) -> None:
    """With tied embeddings the weight lies on both sides."""
    model = write_tiny_llama(tmp_path / "tiny.gguf", tied=tied)
    _, local = sweep(model, imatrix, "CPU")
    with rpc_server(tmp_path / "log") as (device, _):
        furthest, remote = sweep(model, imatrix, device)
    assert furthest == 0
    for here, there in zip(local, remote, strict=True):
        assert there.klds == pytest.approx(here.klds, rel=1e-4)
        assert min(there.klds) > 1e-6
        assert there.errors == here.errors


def test_every_copy_of_a_tied_weight_is_restored(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf", tied=True)
    values = WeightFile(model).rows("token_embd.weight")
    with (
        rpc_server(tmp_path / "log") as (device, _),
        Engine.open(model, n_ctx=64, n_threads=2, device=device) as engine,
    ):
        before = engine.logits(TOKENS)
        with engine.replaced("token_embd.weight", encode(values * np.float32(0.5), "F16")):
            assert not np.array_equal(engine.logits(TOKENS), before)
        assert np.array_equal(engine.logits(TOKENS), before)


def test_two_workers_give_the_probes_of_this_process(model: Path, imatrix: Path) -> None:
    _, local = sweep(model, imatrix, "CPU")
    assert results(pooled(model, imatrix, ["CPU", "CPU"])) == results(local)


def test_when_an_rpc_server_dies_its_probes_are_made_elsewhere(model: Path, imatrix: Path, tmp_path: Path) -> None:
    _, local = sweep(model, imatrix, "CPU")
    lost: list[DynrunError] = []
    with rpc_server(tmp_path / "log") as (device, server):
        assert results(pooled(model, imatrix, [device], JOBS[:1], lost)) == results(local[:1])
        server.kill()
        server.wait()
        assert results(pooled(model, imatrix, ["CPU", device], JOBS, lost)) == results(local)
        with pytest.raises(NetworkError, match=f"no probes on {device}: no llama.cpp RPC server"):
            list(pooled(model, imatrix, [device]))


def test_a_worker_whose_server_is_killed_says_what_llama_cpp_says(model: Path, imatrix: Path, tmp_path: Path) -> None:
    with (
        rpc_server(tmp_path / "log") as (device, server),
        ProbePool(model, imatrix, SEQUENCES, n_ctx=64, n_threads=2, devices=[device]) as pool,
    ):
        list(pool.run(JOBS[:1]))
        server.kill()
        server.wait()
        with pytest.raises(DynrunError, match="Remote RPC server crashed") as raised:
            list(pool.run(JOBS))
    assert device in raised.value.message


def test_what_no_model_is_is_told_with_the_file(imatrix: Path, tmp_path: Path) -> None:
    with pytest.raises(DynrunError, match=r"no probes on CPU: .*none\.gguf"):
        list(pooled(tmp_path / "none.gguf", imatrix, ["CPU"]))


def test_a_worker_ends_with_its_input_and_answers_nothing_but_json(model: Path, imatrix: Path) -> None:
    """Its parent may have been killed."""
    setup = {"reference": str(model), "imatrix": str(imatrix), "n_ctx": 64, "n_threads": 2, "device": "CPU"}
    sequences = [[s.id, s.kind, s.tokens] for s in SEQUENCES]
    with subprocess.Popen(WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps({**setup, "sequences": sequences}) + "\n")
        child.stdin.flush()
        assert json.loads(child.stdout.readline()) == {"ready": True}
        child.stdin.close()
        assert child.stdout.read() == ""
        assert child.wait() == 0
