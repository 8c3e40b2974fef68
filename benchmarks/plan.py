"""How far the planner's bytes are from what llama-server takes, and how long a placement takes to plan.

usage: .venv/bin/python benchmarks/plan.py [MODEL...] [--ctx 2048,8192]

Each model is served as planned on this machine, reads a prompt of a whole batch and writes a few tokens; the peak is
VmHWM of the process (Linux), which counts the pages of a mapped file too. Without MODEL: demo, demo-moe, and what was
made of them.
"""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import replace
from pathlib import Path

from dynrun.config import load_config
from dynrun.gguf.shards import read_whole_header
from dynrun.llamacpp.server import LlamaServer
from dynrun.models import list_models, resolve
from dynrun.runtime.memory import N_UBATCH
from dynrun.runtime.model_facts import ModelFacts, facts_of
from dynrun.runtime.placement import Placement, Wishes
from dynrun.runtime.plan import plan
from dynrun.runtime.this_machine import this_machine

MIB = 1 << 20
N_PREDICT = 4


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--ctx", default="2048,8192")
    parser.add_argument("--mmap", action="store_true", help="also with the file mapped, where it is planned otherwise")
    given = parser.parse_args()
    models = given.models or ["demo", "demo-moe", *(m.name for m in list_models() if m.name.startswith("demo:"))]
    machine = this_machine()
    print(f"{'model':22} {'ctx':>6} {'loaded':>11} {'planned MiB':>12} {'measured':>9} {'off':>7} {'plan ms':>8}")
    for model in models:
        path = resolve(model).path
        facts = facts_of(read_whole_header(path))
        for n_ctx in map(int, given.ctx.split(",")):
            found, took_s = timed_plan(facts, n_ctx)
            line(model, path, found, took_s)
            if given.mmap and found.choice.load_mode == "read":
                plain = replace(machine, repacked=())
                line(model, path, plan(facts, plain, Wishes(n_ctx=n_ctx, prompt_cache_bytes=0)), took_s, "-nr")


def timed_plan(facts: ModelFacts, n_ctx: int) -> tuple[Placement, float]:
    """The placement here, and the seconds of this process that it took (the best of five)."""
    machine, wishes, times = this_machine(), Wishes(n_ctx=n_ctx, prompt_cache_bytes=0), []
    for _ in range(5):
        began = time.process_time()
        found = plan(facts, machine, wishes)
        times.append(time.process_time() - began)
    return found, min(times)


def line(model: str, path: Path, found: Placement, took_s: float, *more: str) -> None:
    """Serve, measure, print."""
    measured = peak(path, found, *more)
    planned = sum(found.device_bytes.values())
    how = f"{found.choice.load_mode}{' '.join(('', *more))}"
    print(
        f"{model:22} {found.choice.n_ctx:6} {how:>11} {planned / MIB:12,.1f} {measured / MIB:9,.1f}"
        f" {planned / measured - 1:+7.1%} {took_s * 1e3:8.2f}",
        flush=True,
    )


def peak(path: Path, found: Placement, *more: str) -> int:
    """Bytes of llama-server's largest resident set."""
    options = ["-m", path, *found.argv, *more, "-t", str(load_config().n_threads), "--no-cache-idle-slots"]
    with LlamaServer(options, name=path.name) as server, server.client() as client:
        # Token numbers: how long a text becomes depends on the vocabulary.
        tokens = [token % 256 for token in range(N_UBATCH + 64)]
        asked = {"prompt": tokens, "n_predict": N_PREDICT, "temperature": 0}
        client.post("/completion", json=asked, timeout=1200).raise_for_status()
        status = Path(f"/proc/{server.pid}/status").read_text(encoding="utf-8")
    match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    assert match
    return int(match[1]) * 1024


if __name__ == "__main__":
    main()
