"""A model on two memories: an RPC server on this machine is the device, RAM the other one."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynrun.gguf.header import read_header
from dynrun.llamacpp.server import ServerDiedError
from dynrun.runtime.events import Event, Finished, Ready, Retreated, Said, Starting
from dynrun.runtime.history import Message
from dynrun.runtime.ladder import Job
from dynrun.runtime.machine import Machine
from dynrun.runtime.model_facts import facts_of
from dynrun.runtime.opening import Where, planner_for
from dynrun.runtime.placement import Choice, Wishes
from dynrun.runtime.remembered import remembered
from dynrun.runtime.remote_devices import with_rpc
from dynrun.runtime.sampling import Sampling
from dynrun.runtime.session import Session
from tests.rpc import rpc_server
from tests.tiny import write_tiny_llama

pytestmark = [pytest.mark.native, pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")]
GREEDY = Sampling(temperature=0.0, max_tokens=10)
WISHES = Wishes(n_ctx=512, prompt_cache_bytes=0)
N_LAYERS = 4
QUESTION = [Message("user", "the cat")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 MB, nearly all in experts: 12.6 MB a layer."""
    path = tmp_path_factory.mktemp("moe") / "moe.gguf"
    return write_tiny_llama(path, n_expert=8, n_block=N_LAYERS, n_ff=1024, n_ctx_train=1024)


def machine() -> Machine:
    return Machine("test", (), 1 << 34, 1 << 34, 40e9, 1)


def session(model: Path, choice: Choice, rpc: tuple[str, ...] = ()) -> Session:
    """A session that begins with ``choice``, as one that worked before would be."""
    here = with_rpc(machine(), rpc)
    remembered(model, here, WISHES, rpc).keep(choice)
    planner = planner_for(model, Where(WISHES, rpc=rpc), here)
    return Session(Job(model, 1, rpc=rpc), planner, templated=True)


def on_device(n_cpu_moe: int) -> Choice:
    whole = N_LAYERS + 1
    return Choice(512, n_gpu_layers=whole, n_cpu_moe=n_cpu_moe, layers_of=(whole,), devices=("RPC0",))


def greedy(opened: Session) -> str:
    *_, last = opened.ask(QUESTION, sampling=GREEDY)
    assert isinstance(last, Finished)
    return last.answer.text


def buffers(opened: Session) -> dict[str, float]:
    """MiB of weights in each memory, as llama-server logs them."""
    assert opened._running is not None
    found = re.findall(
        r"load_tensors: +(\S+?)(?:\[.*\])? model buffer size = +([\d.]+) MiB", opened._running.server.log_text()
    )
    return {name: float(size) for name, size in found}


@pytest.fixture(scope="module")
def in_ram(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The greedy text of the model that is all in RAM, in the file's own order of weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNRUN_CACHE", str(tmp_path_factory.mktemp("cache")))
        with session(model, Choice(512, load_mode="mmap-plain")) as opened:
            return greedy(opened)


def test_experts_in_ram_and_the_rest_on_the_device_say_the_same(model: Path, in_ram: str, tmp_path: Path) -> None:
    with rpc_server(tmp_path / "log") as (device, _):
        server = device.removeprefix("rpc:")
        with session(model, on_device(N_LAYERS), (server,)) as opened:
            assert greedy(opened) == in_ram
            held = buffers(opened)
            assert held["CPU_Mapped"] > 45
            assert 0 < held["RPC0"] < 5
            placement = opened.placement
    assert placement is not None
    assert placement.verdict == "gpu+ram"
    assert facts_of(read_header(model)).moe_layers == (0, 1, 2, 3)


def test_a_device_with_little_memory_is_climbed_down_from_and_remembered(
    model: Path, in_ram: str, tmp_path: Path
) -> None:
    """50 MB of address space for 50 MB of weights, a KV cache, and compute buffers."""
    with rpc_server(tmp_path / "log", memory_kb=50_000) as (device, _):
        servers = (device.removeprefix("rpc:"),)
        with session(model, on_device(0), servers) as opened:
            events = list(opened.ask(QUESTION, sampling=GREEDY))
            rungs = [event.placement.choice for event in events if isinstance(event, Retreated)]
            assert [choice.n_cpu_moe for choice in rungs] == list(range(1, len(rungs) + 1))
            assert isinstance(events[-1], Finished)
            assert events[-1].answer.text == in_ram
            held = buffers(opened)
            assert held["CPU_Mapped"] > 12
            assert held["RPC0"] > 1
        kept = remembered(model, with_rpc(machine(), servers), WISHES, servers).choice()
        assert kept == rungs[-1]


def test_a_device_that_dies_in_mid_answer_is_told_with_what_to_do(model: Path, tmp_path: Path) -> None:
    def until_it_dies(events: Iterator[Event]) -> list[Event]:
        seen: list[Event] = []
        for event in events:
            seen.append(event)
            if isinstance(event, Said):
                rpc.kill()
                rpc.wait()
        return seen

    with rpc_server(tmp_path / "log") as (device, rpc):
        server = device.removeprefix("rpc:")
        with session(model, on_device(0), (server,)) as opened:
            starting, ready = opened.start()
            assert isinstance(starting, Starting)
            assert isinstance(ready, Ready)
            with pytest.raises(ServerDiedError, match="Remote RPC server") as caught:
                until_it_dies(opened.ask(QUESTION, sampling=Sampling(temperature=0.0)))
    assert "start the RPC server again" in caught.value.fix
    assert caught.value.exit_code == 1
