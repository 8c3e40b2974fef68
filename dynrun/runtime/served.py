"""Which models `dynrun serve` is serving on this machine, so that `run` need not load one a second time.

Each server leaves a record that only this user can read, naming the file of its key, not the key. A record counts as
long as the process that wrote it lives; kill -9 leaves one behind, which the next look removes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2

from dynrun.artifacts import write_json
from dynrun.errors import DynrunError
from dynrun.llamacpp.server import read_keys
from dynrun.paths import cache_dir
from dynrun.runtime.session import Attached

_ANSWER_S = 2.0
# A process's start is told in ticks since a boot whose time moves with the clock.
_CLOCK_S = 2.0


def served_dir() -> Path:
    """Where the records lie."""
    return cache_dir() / "served"


@contextmanager
def announced(url: str, key_file: Path, models: Mapping[str, tuple[Path, int]]) -> Iterator[None]:
    """Say that this process serves ``models``: (file, context of a slot) by the name that requests give."""
    record = served_dir() / f"{os.getpid()}.json"
    served_dir().mkdir(parents=True, exist_ok=True, mode=0o700)
    listed = {name: {"path": str(path), "n_ctx": n_ctx} for name, (path, n_ctx) in models.items()}
    write_json(record, {"started_s": _started_s(os.getpid()), "url": url, "key_file": str(key_file), "models": listed})
    try:
        yield
    finally:
        record.unlink(missing_ok=True)


def find_served(model: Path, n_ctx: int = 0) -> Attached | None:
    """A running server of ``model`` with at least ``n_ctx`` tokens of context; None where there is none."""
    for record in sorted(served_dir().glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, DynrunError):
            data = json.loads(record.read_text(encoding="utf-8"))
            if abs(_started_s(int(record.stem)) - data["started_s"]) > _CLOCK_S:
                record.unlink(missing_ok=True)
                continue
            if (found := _attached(data, model, n_ctx)) is not None:
                return found
    return None


def _attached(data: dict[str, Any], model: Path, n_ctx: int) -> Attached | None:
    for name, entry in data["models"].items():
        if Path(entry["path"]) == model and entry["n_ctx"] >= n_ctx:
            found = Attached(data["url"], read_keys(Path(data["key_file"]))[0], entry["n_ctx"], name)
            return found if _answers(found) else None
    return None


def _answers(server: Attached) -> bool:
    headers = {"Authorization": f"Bearer {server.api_key}"}
    try:
        answer = httpx2.get(f"{server.url}/v1/models", headers=headers, timeout=_ANSWER_S, trust_env=False)
    except (httpx2.RequestError, httpx2.InvalidURL):
        return False
    return answer.status_code == httpx2.codes.OK


def _started_s(pid: int) -> float:
    """When a process began; 0 where there is none."""
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return 0.0
