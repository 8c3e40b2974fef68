"""`dynrun serve` under many streaming clients that hang up whenever they like.

    python -m benchmarks.serve_load [demo:Q3_K_M] [--clients 200] [--seconds 600] [--parallel 8]

Every client asks, reads its answer piece by piece, and asks again; of three requests one is broken off: before the
first token or amid the answer, by a close or by a reset. JSON on standard output: what became of the requests, the
time to the first token of those that were not broken off, memory and open files of dynrun and its server before and
after, and what the server keeps of earlier prompts. Ends with 1 where a request failed, the server answers no more,
files grow, or memory does beyond that, dynrun ends otherwise than with 0, or its server outlives it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil

from dynrun.paths import logs_dir

_CUT = 1 / 3
_QUESTIONS = ("Who was Ada Lovelace?", "Count to twenty.", "Why is the sky blue?", "Tell me of a lighthouse keeper.")
# A client waits for its turn among all the others.
_PATIENCE_S = 900.0
# What may stay open or in memory when all is quiet again.
_MORE_FILES, _MORE_BYTES = 16, 256 << 20
_QUIET_S = 30.0


@dataclass
class Tally:
    """``outcomes``: whole, cut, and each kind of failure; ``first_s``: seconds to the first token."""

    outcomes: Counter[str] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)
    tokens: int = 0


@dataclass(frozen=True)
class Request:
    """``cut_at``: pieces after which the client hangs up, 0 before the first; None reads to the end."""

    question: str
    max_tokens: int
    cut_at: int | None
    reset: bool

    @classmethod
    def drawn(cls, chance: random.Random) -> Request:
        """Any request."""
        n = chance.randint(4, 32)
        cut_at = chance.randint(0, n - 1) if chance.random() < _CUT else None
        return cls(f"{chance.random():.6f} {chance.choice(_QUESTIONS)}", n, cut_at, chance.random() < 0.5)

    @property
    def body(self) -> dict[str, object]:
        return {
            "messages": [{"role": "user", "content": self.question}],
            "max_tokens": self.max_tokens,
            "stream": True,
            "ignore_eos": True,
        }


async def ask(client: httpx2.AsyncClient, request: Request, tally: Tally) -> str:
    """What became of ``request``."""
    began, pieces, stopped = time.monotonic(), 0, False
    async with client.stream("POST", "/v1/chat/completions", json=request.body) as response:
        if response.status_code != httpx2.codes.OK:
            return f"status {response.status_code}"
        async for line in response.aiter_lines():
            if request.cut_at is not None and pieces >= request.cut_at:
                _hang_up(response, request.reset)
                return "cut"
            if line == "data: [DONE]":
                break
            if not line.startswith("data: "):
                continue
            choice = json.loads(line.removeprefix("data: "))["choices"][0]
            if choice["delta"].get("content"):
                pieces += 1
                if pieces == 1 and request.cut_at is None:
                    tally.first_s.append(time.monotonic() - began)
            stopped = stopped or choice["finish_reason"] is not None
    tally.tokens += pieces
    return "whole" if stopped and pieces else "ended early"


def _hang_up(response: httpx2.Response, reset: bool) -> None:
    """The block around it closes the connection: politely, or so that the system sends a reset."""
    connection = response.extensions["network_stream"].get_extra_info("socket")
    if reset and connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def one_client(client: httpx2.AsyncClient, number: int, until: float, tally: Tally) -> None:
    """Ask again and again."""
    chance = random.Random(number)  # noqa: S311
    while time.monotonic() < until:
        try:
            outcome = await ask(client, Request.drawn(chance), tally)
        except (httpx2.HTTPError, ValueError, LookupError) as error:
            outcome = f"{type(error).__name__}: {error}"[:100]
            await asyncio.sleep(0.1)
        tally.outcomes[outcome] += 1


async def load(said: dict[str, Any], key: str, clients: int, seconds: float, watch: list[psutil.Process]) -> Tally:
    """All clients at once; a line on standard error every half minute."""
    tally, until = Tally(), time.monotonic() + seconds
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(
        base_url=said["url"], headers=headers, limits=limits, timeout=_PATIENCE_S, trust_env=False
    ) as client:
        work = asyncio.gather(*(one_client(client, number, until, tally) for number in range(clients)))
        while not work.done():
            await asyncio.wait([work], timeout=30.0)
            print(
                f"{until - time.monotonic():.0f} s: {dict(tally.outcomes)} {measured(watch)}",
                file=sys.stderr,
                flush=True,
            )
        await work
    return tally


def measured(watch: list[psutil.Process]) -> dict[str, dict[str, int]]:
    """Memory and open files of each process, by name."""
    found = {}
    for label, process in zip(("dynrun", "server"), watch, strict=True):
        with suppress(psutil.Error):
            found[label] = {"rss_bytes": process.memory_info().rss, "files": process.num_fds()}
    return found


def answers(said: dict[str, Any], key: str) -> bool:
    """Whether one question is answered."""
    body = Request("Hello", 4, None, False).body | {"stream": False}
    headers = {"Authorization": f"Bearer {key}"}
    url = f"{said['url']}/v1/chat/completions"
    with suppress(httpx2.HTTPError):
        answer = httpx2.post(url, json=body, headers=headers, timeout=_PATIENCE_S, trust_env=False)
        return answer.status_code == httpx2.codes.OK and answer.json()["usage"]["completion_tokens"] == 4
    return False


def quiet(watch: list[psutil.Process], before: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """What is measured once the last connections are gone, or after half a minute."""
    deadline = time.monotonic() + _QUIET_S
    while (found := measured(watch)) and time.monotonic() < deadline:
        if all(found[label]["files"] <= before[label]["files"] for label in found):
            break
        time.sleep(0.5)
    return found


def prompt_cache_bytes() -> int:
    """What the server keeps of earlier prompts, as its log says; it may, up to what was planned for it."""
    log = max(logs_dir().glob("*-llama-server.log"), key=lambda path: path.stat().st_mtime)
    said = re.findall(r"cache state: \d+ prompts, ([\d.]+) MiB", log.read_text(errors="replace"))
    return int(float(said[-1]) * (1 << 20)) if said else 0


def faults_of(result: dict[str, Any]) -> list[str]:
    """What is promised and was not kept."""
    before, after = result["before"], result["after"]
    failed = sum(n for outcome, n in result["outcomes"].items() if outcome not in ("whole", "cut"))
    found = [f"{failed} requests failed"] if failed else []
    if set(after) != set(before) or not result["answers_afterwards"]:
        found.append("the server answers no more")
    for label in after:
        if after[label]["files"] > before[label]["files"] + _MORE_FILES:
            found.append(f"{label} has more open files")
        kept = result["prompt_cache_bytes"] if label == "server" else 0
        if after[label]["rss_bytes"] > before[label]["rss_bytes"] + _MORE_BYTES + kept:
            found.append(f"{label} has grown")
    if result["exit_code"]:
        found.append(f"dynrun serve ended with {result['exit_code']}")
    return [*found, *(["llama-server outlives it"] if result["orphan"] else [])]


def run(model: str, clients: int, seconds: float, parallel: int) -> dict[str, Any]:
    argv = [sys.executable, "-m", "dynrun.cli.app", "serve", model, "--port", "0", "--json"]
    argv += ["--parallel", str(parallel), "--ctx", "512"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            key = Path(said["api_key_file"]).read_text().strip()
            (server,) = psutil.Process(process.pid).children()
            watch = [psutil.Process(process.pid), server]
            assert answers(said, key)
            before = measured(watch)
            tally = asyncio.run(load(said, key, clients, seconds, watch))
            still, after = answers(said, key), quiet(watch, before)
        finally:
            process.send_signal(signal.SIGTERM)
            exit_code = process.wait(120)
    _, alive = psutil.wait_procs([server], timeout=10)
    first = np.array(tally.first_s or [np.nan])
    result = {
        "model": model,
        "clients": clients,
        "parallel": parallel,
        "seconds": seconds,
        "outcomes": dict(tally.outcomes),
        "tokens": tally.tokens,
        "first_token_s": {"p50": float(np.median(first)), "p99": float(np.quantile(first, 0.99)), "n": len(first)},
        "before": before,
        "after": after,
        "prompt_cache_bytes": prompt_cache_bytes(),
        "answers_afterwards": still,
        "exit_code": exit_code,
        "orphan": bool(alive),
    }
    return result | {"faults": faults_of(result)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo:Q3_K_M")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--parallel", type=int, default=8)
    options = parser.parse_args()
    result = run(options.model, options.clients, options.seconds, options.parallel)
    print(json.dumps(result, indent=1))
    return bool(result["faults"])


if __name__ == "__main__":
    sys.exit(main())
