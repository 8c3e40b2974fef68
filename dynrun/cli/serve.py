"""`dynrun serve`: an OpenAI-compatible server in the foreground."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event as Flag
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from dynrun.cli import options
from dynrun.cli.output import say
from dynrun.cli.running import Running, crashes_told, narrate, placed
from dynrun.errors import UsageError

if TYPE_CHECKING:
    from dynrun.llamacpp.server import Listen
    from dynrun.runtime.events import Event


@placed
def serve(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="As for `dynrun run`; several by a router.")],
    settings: Running,
    host: Annotated[
        str, typer.Option("--host", help="Another address than this machine's own needs keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 for a free one.")] = 8080,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="Keys that are let in, one a line.")
    ] = None,
    parallel: Annotated[
        int, typer.Option("--parallel", min=1, max=256, help="Requests at once, each with its own context.")
    ] = 1,
    models_max: Annotated[
        int, typer.Option("--models-max", min=1, help="Of several models so many at once; the others wait on the disk.")
    ] = 1,
    as_json: options.AsJson = False,
) -> None:
    """Serve models to other programs until Ctrl+C, by the OpenAI protocol; `dynrun run` uses the server too.

    Example: dynrun serve demo:Q3_K_M --port 8080
    """
    from dynrun.models import resolve
    from dynrun.runtime.serving import listen_at

    listen = listen_at(host, port, api_key_file)
    _check(models, settings)
    found = {model: resolve(model).path for model in models}
    with crashes_told(), _until_stopped() as stopped:
        if len(found) == 1:
            ((name, path),) = found.items()
            events = _one(name, path, settings, listen, parallel, stopped)
        else:
            events = _several(found, settings, listen, parallel, models_max, stopped)
        for event in events:
            narrate(event, ", ".join(found))
            _announce(event, list(found), listen, as_json)
    say("the server has ended")


def _check(models: list[str], settings: Running) -> None:
    if len(set(models)) < len(models):
        raise UsageError("a model is named twice", fix="name each once")
    if len(models) > 1 and (settings.mmproj or settings.chat_template):
        raise UsageError("--mmproj and --chat-template are of one model", fix="serve that one alone")


def _one(name: str, path: Path, settings: Running, listen: Listen, parallel: int, stopped: Flag) -> Iterator[Event]:
    from dynrun.config import load_config
    from dynrun.runtime.ladder import Job
    from dynrun.runtime.opening import planner_for
    from dynrun.runtime.serving import serve

    config = load_config()
    planner = planner_for(path, settings.where(parallel=parallel, prompt_cache_bytes=None))
    job = Job(path, config.n_threads, settings.chat_template, settings.rpc, listen)
    return serve(job, planner, name, stopped)


def _several(
    found: dict[str, Path], settings: Running, listen: Listen, parallel: int, models_max: int, stopped: Flag
) -> Iterator[Event]:
    from dynrun.cli.running import summary
    from dynrun.config import load_config
    from dynrun.runtime.ladder import Job
    from dynrun.runtime.opening import planner_for
    from dynrun.runtime.serving import serve_several

    config = load_config()
    where = settings.where(parallel=parallel, prompt_cache_bytes=None)
    argvs: dict[str, tuple[str, ...]] = {}
    served: dict[str, tuple[Path, int]] = {}
    for name, path in found.items():
        placement, _ = planner_for(path, where).first()
        say(f"{name}: {summary(placement)}")
        argvs[name] = Job(path, config.n_threads, settings.chat_template, settings.rpc).options(placement)
        served[name] = (path, placement.choice.n_ctx)
    return serve_several(argvs, served, listen, models_max=models_max, cancel=stopped)


def _announce(event: Event, models: list[str], listen: Listen, as_json: bool) -> None:
    """The address, once it answers: on stdout, so that a program that started this one can read it."""
    from dynrun.runtime.events import Ready

    if not isinstance(event, Ready):
        return
    if as_json:
        data = {"url": event.url, "api_key_file": str(listen.key_file), "models": models, "n_ctx": event.n_ctx}
        print(json.dumps(data, ensure_ascii=False), flush=True)
    else:
        print(f"url      {event.url}/v1\nkey      in {listen.key_file}\nmodels   {', '.join(models)}", flush=True)
        say("Ctrl+C ends it")


@contextmanager
def _until_stopped() -> Iterator[Flag]:
    """A flag that Ctrl+C and SIGTERM set; both are the normal end of a server."""
    flag = Flag()

    def stop(_number: int, _frame: FrameType | None) -> None:
        flag.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.stdout.flush()
