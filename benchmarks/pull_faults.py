"""What a pull costs when everything goes wrong: shards of a real model, each fault of a network once a round.

usage: .venv/bin/python -m benchmarks.pull_faults MODEL.gguf [--rounds 20] [--shard-size 40M]

llama-gguf-split makes the shards; each round pulls them into an empty cache from a server that gives, at random
requests and bytes, 401, 403, 404, 429, 500, 503, a stall, a reset, a cut body, wrong bytes and a late answer, and two
more faults to the questions before. A line of JSON a round: whether every SHA-256 is right, the bytes fetched beyond
the files' size, and the bytes that wrong bytes destroyed (their whole file). Ends with exit code 1 if a round is not
right, or fetched more than was destroyed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from hashlib import file_digest
from pathlib import Path

import pytest

from dynrun.hub.pull import pull
from dynrun.hub.repository import fetch_repository
from dynrun.hub.transfer import TransferSettings
from dynrun.llamacpp.tools import split_file
from tests.hub_server import let_all_go_wrong, serving_here

# The server shares this process: on a busy machine it may be silent for a second.
_SETTINGS = TransferSettings(connections=4, stall_s=4.0, backoff_s=0.05, piece_bytes=8 << 20, attempts=20)


def one_round(folder: Path, shards: list[Path], seed: int) -> dict[str, object]:
    """Pull all ``shards`` once."""
    with pytest.MonkeyPatch.context() as patch, serving_here(patch, folder) as hub:
        hub.models["o/m"] = {path.name: path.read_bytes() for path in shards}
        faults, spoiled = let_all_go_wrong(hub, random.Random(seed))  # noqa: S311
        started = time.monotonic()
        pulled = pull(fetch_repository("o/m").files, "main", settings=_SETTINGS)
        elapsed_s = time.monotonic() - started
        right = all(
            _sha256(file.path) == file.sha256 == _sha256(s) for file, s in zip(pulled.files, shards, strict=True)
        )
        size = sum(path.stat().st_size for path in shards)
        destroyed = sum(path.stat().st_size for path in shards if path.name in spoiled)
    shutil.rmtree(folder / "hub")
    return {
        "seed": seed,
        "right": right,
        "faults_left": faults,
        "fetched_twice": pulled.fetched_bytes - size,
        "destroyed": destroyed,
        "elapsed_s": round(elapsed_s, 2),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--shard-size", default="40M")
    wanted = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        shards = split_file(wanted.model, folder / "shards" / "model", max_size=wanted.shard_size)
        print(json.dumps({"shards": [path.stat().st_size for path in shards], "cores": os.cpu_count()}), flush=True)
        for seed in range(wanted.rounds):
            row = one_round(folder, shards, seed)
            good &= bool(row["right"]) and row["fetched_twice"] == row["destroyed"] and not row["faults_left"]
            print(json.dumps(row), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
