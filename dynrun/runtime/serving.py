"""A server for other programs, in the foreground: OpenAI-compatible, kept up while memory allows.

Takes a job and a planner (ladder.py), gives events until it is cancelled. Its record (served.py) lets `run` use it.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Event as Flag

from dynrun.artifacts import atomic_path
from dynrun.errors import UsageError
from dynrun.llamacpp.server import Listen, LlamaServer, ServerDiedError, ServerOutOfMemoryError, read_keys, write_key
from dynrun.paths import data_dir
from dynrun.runtime import ladder
from dynrun.runtime.events import Event, Ready, Restarted
from dynrun.runtime.ladder import Job, Planner
from dynrun.runtime.router import presets
from dynrun.runtime.served import announced

_WATCH_S = 0.5


def listen_at(host: str, port: int, key_file: Path | None) -> Listen:
    """Where to listen: with the user's own keys, or on this machine alone with a key that is made once.

    Raises UsageError for another machine's reach without keys, NotFoundError for a key file that is none.
    """
    if key_file is not None:
        read_keys(key_file)
        return Listen(host, port, key_file)
    if not is_loopback(host):
        raise UsageError(
            f"--host {host} lets other machines in", fix="write keys into a file and name it with --api-key-file"
        )
    own = data_dir() / "api-key"
    if not own.exists():
        write_key(own, secrets.token_urlsafe(32))
    return Listen(host, port, own)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(job: Job, planner: Planner, name: str, cancel: Flag) -> Iterator[Event]:
    """Serve one model until ``cancel`` is set; out of memory it goes on with less, at the same address.

    Raises ServerDiedError for any other death.
    """
    running = yield from ladder.start(job, planner, cancel)
    while True:
        server, n_ctx = running.server, running.placement.choice.n_ctx
        try:
            with announced(server.url, server.key_file, {name: (job.model, n_ctx)}):
                died = _watched(server, cancel)
        finally:
            server.stop()
        if died is None:
            return
        died = ladder.explained(job, died)
        if not isinstance(died, ServerOutOfMemoryError):
            raise died
        yield Restarted()
        job = replace(job, listen=replace(job.listen, port=server.port))
        running = yield from ladder.retreat(job, planner, running.placement, died, cancel)


def serve_several(
    options: Mapping[str, tuple[str, ...]],
    models: Mapping[str, tuple[Path, int]],
    listen: Listen,
    *,
    models_max: int,
    cancel: Flag,
) -> Iterator[Event]:
    """Serve models by llama-server's router: ``options`` of each, and (file, context) by name.

    Each is loaded at its first request; ``models_max`` may be there at once.
    """
    assert listen.key_file is not None
    ini = data_dir() / "served" / f"{secrets.token_hex(8)}.ini"
    with atomic_path(ini) as temporary:
        temporary.write_text(presets(options), encoding="utf-8")
    router = ["--models-preset", str(ini), "--models-max", str(models_max)]
    # A model's own server is told no key file but inherits the environment; without a key anybody here could ask it.
    environment = {"LLAMA_API_KEY": ",".join(read_keys(listen.key_file))}
    try:
        server = LlamaServer(router, name=", ".join(options), listen=listen, environment=environment, cancel=cancel)
        with server, announced(server.url, server.key_file, models):
            yield Ready(server.url, max(n_ctx for _, n_ctx in models.values()), 0.0)
            if (died := _watched(server, cancel)) is not None:
                raise died
    finally:
        ini.unlink(missing_ok=True)


def _watched(server: LlamaServer, cancel: Flag) -> ServerDiedError | None:
    """Wait for the server's death, or for ``cancel``."""
    while not cancel.is_set():
        if (died := server.death(within_s=_WATCH_S)) is not None:
            return died
    return None
