"""What `run` promises, measured: the child's speed beside llama-bench's, the first token, orphans, two memories.

    python -m benchmarks.run speed MODEL [--rounds 5]     # generation through the child / llama-bench, in turns
    python -m benchmarks.run orphans [--starts 50]        # starts, kill -9 of dynrun, of the server, crashes at load
    python -m benchmarks.run offload                      # demo-moe: experts in RAM, the rest on an RPC device

Each prints a table and ends with 1 where a promise is broken.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import psutil

from dynrun.config import load_config
from dynrun.gguf.header import read_header
from dynrun.llamacpp import tools
from dynrun.llamacpp.process import new_log
from dynrun.models import resolve
from dynrun.runtime.bench_setups import bench_options
from dynrun.runtime.events import Answer, Finished
from dynrun.runtime.history import Message
from dynrun.runtime.ladder import Job, Planner
from dynrun.runtime.machine import Machine
from dynrun.runtime.model_facts import facts_of
from dynrun.runtime.opening import Where, open_session
from dynrun.runtime.placement import Choice, Wishes
from dynrun.runtime.plan import placed
from dynrun.runtime.remote_devices import with_rpc
from dynrun.runtime.sampling import Sampling
from dynrun.runtime.session import Session
from tests.rpc import rpc_server
from tests.tiny import write_tiny_llama

_N_GEN = 128
_SPEED, _FIRST_TOKEN_S = 0.97, 0.030
_QUESTION = "Tell a long story about a lighthouse keeper and a storm."


def speed(name: str, rounds: int) -> bool:
    """Generation through `run`'s child and llama-bench's, in turns; and the first token beside the server's report."""
    model, threads = resolve(name).path, load_config().n_threads
    through, direct, late = [], [], []
    sampling = Sampling(temperature=0.0, max_tokens=_N_GEN)
    with open_session(model, Where(Wishes(n_ctx=2048, prompt_cache_bytes=0)), n_threads=threads) as session:
        list(session.start())
        assert session.placement is not None
        options = bench_options(session.placement)
        for number in range(rounds):
            # Another beginning each time, so that no prompt is in the cache.
            answer = _answer(session, f"{number}. {_QUESTION}", sampling)
            through.append(answer.timings.predicted_per_second)
            assert answer.first_token_s is not None
            # The first token is drawn from the prompt's own logits.
            late.append(answer.first_token_s - answer.timings.prompt_ms / 1e3)
            sizes = {"n_prompt": 0, "n_gen": _N_GEN, "repetitions": 1}
            (row,) = tools.bench(model, **sizes, n_threads=threads, options=options)
            direct.append(row.tokens_per_second)
    ratio, lateness = median(through) / median(direct), median(late)
    print(f"through run's child {median(through):8.2f} tokens/s {_spread(through)}")
    print(f"llama-bench         {median(direct):8.2f} tokens/s {_spread(direct)}")
    print(f"ratio               {ratio:8.3f} (promised: {_SPEED})")
    print(f"first token         {lateness * 1e3:8.1f} ms after the server's own report (promised: 30)")
    return ratio >= _SPEED and lateness <= _FIRST_TOKEN_S


def _answer(session: Session, text: str, sampling: Sampling) -> Answer:
    *_, last = session.ask([Message("user", text)], sampling=sampling)
    assert isinstance(last, Finished)
    return last.answer


def _spread(values: list[float]) -> str:
    return f"({min(values):.2f}–{max(values):.2f} of {len(values)})"


def orphans(starts: int) -> bool:
    """Commands that end in every way there is; afterwards no process of theirs may be left."""
    ends = {"killed with -9": _killed, "its server killed": _server_killed, "left to end": _left, "no model": _crashed}
    counts = dict.fromkeys(ends, 0)
    with TemporaryDirectory() as folder:
        model = write_tiny_llama(Path(folder) / "tiny.gguf", n_ctx_train=512)
        broken = Path(folder) / "broken.gguf"
        broken.write_bytes(model.read_bytes().replace(b"llama", b"lxama"))
        for number in range(starts):
            name = list(ends)[number % len(ends)]
            ends[name](broken if name == "no model" else model)
            counts[name] += 1
        left = psutil.wait_procs(_servers(folder), timeout=10)[1]
    for name, count in counts.items():
        print(f"{name:20} {count:4}")
    print(f"{'left behind':20} {len(left):4}")
    return not left


def _command(model: Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "dynrun.cli.app", "run", str(model), "-p", "x", "--temp", "0", "-n", "64"]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)


def _killed(model: Path) -> None:
    with _command(model) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.kill()


def _server_killed(model: Path) -> None:
    with _command(model) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        for child in psutil.Process(process.pid).children():
            os.kill(child.pid, signal.SIGKILL)
        process.communicate()


def _left(model: Path) -> None:
    with _command(model) as process:
        process.communicate()


_crashed = _left


def _servers(folder: str) -> list[psutil.Process]:
    """Those that serve a model in ``folder``: nobody else's."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name() == "llama-server" and folder in " ".join(process.cmdline()):
                found.append(process)
    return found


def offload() -> bool:
    """demo-moe with its experts in RAM and the rest on a device that is an RPC server, beside all in RAM."""
    model, threads = resolve("demo-moe").path, load_config().n_threads
    facts, sampling = facts_of(read_header(model)), Sampling(temperature=0.0, max_tokens=48)
    plain = Machine("here", (), 1 << 36, 1 << 36, 40e9, threads)
    with rpc_server(new_log("rpc-server")) as (device, _):
        server = device.removeprefix("rpc:")
        whole = facts.n_layer + 1
        split = Choice(1024, n_gpu_layers=whole, n_cpu_moe=facts.n_layer, layers_of=(whole,), devices=("RPC0",))
        texts, lines = [], []
        for choice, machine, rpc in (
            (Choice(1024, load_mode="mmap-plain"), plain, ()),
            (split, with_rpc(plain, [server]), (server,)),
        ):
            placement = placed(facts, machine, choice)
            planner = Planner(lambda found=placement: (found, False), lambda *_: None)
            with Session(Job(model, threads, rpc=rpc), planner, templated=True) as session:
                started = time.monotonic()
                texts.append(_answer(session, "Why is the sky blue?", sampling).text)
                assert session._running is not None
                log = session._running.server.log_text().splitlines()
                lines = [line.split(" I ", 1)[-1] for line in log if "buffer size" in line]
                print(f"{'split' if rpc else 'all in RAM'}: {time.monotonic() - started:.1f} s")
    print("\n".join(lines))
    print(f"text: {texts[1]!r}")
    print("equal" if texts[0] == texts[1] else f"NOT EQUAL to {texts[0]!r}")
    return texts[0] == texts[1]


def main() -> int:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "orphans", "offload"))
    parser.add_argument("model", nargs="?", default="demo:Q3_K_M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=50)
    given = parser.parse_args()
    kept = {
        "speed": lambda: speed(given.model, given.rounds),
        "orphans": lambda: orphans(given.starts),
        "offload": offload,
    }[given.what]()
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
