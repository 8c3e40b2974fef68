"""A llama-server child: started, waited for, stopped; its death told with its cause.

Takes options, gives a URL and an API key for as long as the ``with`` block lasts. A crash or an out-of-memory in
the child never takes dynrun down. Does not know chats, prompts or placements: that is runtime/.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import IO, Self

import httpx2

from dynrun.artifacts import translated_os_errors
from dynrun.errors import INTERRUPTED_EXIT_CODE, DoesNotFitError, DynrunError, NotFoundError
from dynrun.gguf.header import read_header
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.process import new_log, scrubbed_environment, spawned
from dynrun.llamacpp.server_log import Death, cause_of_death, last_lines
from dynrun.paths import cache_dir

DEFAULT_N_CTX = 4096
LOOPBACK = "127.0.0.1"
_POLL_S = 0.02
# How much of a log is read. A start logs a few hundred kilobytes.
_LOG_BYTES = 8 << 20
# How long a broken connection may be ahead of the end of the process that broke it (a core dump takes its time).
_DYING_S = 10.0
# "…: listening on http://127.0.0.1:38417"
_LISTENING = re.compile(r"^\S+ I srv +llama_server: listening on http://.+:(\d+)$", re.MULTILINE)


class ServerDiedError(DynrunError):
    """llama-server ended by itself; the message names the cause, ``last_lines`` are its log's."""

    def __init__(self, message: str, *, fix: str = "", log: Path | None = None, lines: tuple[str, ...] = ()) -> None:
        super().__init__(message, fix=fix, log=log)
        self.last_lines = lines


class ServerOutOfMemoryError(ServerDiedError, DoesNotFitError):
    """llama-server ended because memory ran out; ``host``: the RAM, not a device's."""

    host = False


class CancelledError(DynrunError):
    """The user did not want to wait any longer."""

    exit_code = INTERRUPTED_EXIT_CODE


@dataclass(frozen=True)
class Listen:
    """Where a server listens: port 0 is a free one. ``key_file`` holds the keys that are let in, one a line; None makes
    one for this server alone."""

    host: str = LOOPBACK
    port: int = 0
    key_file: Path | None = None


class LlamaServer:
    """llama-server with ``options``; a context manager.

    It listens as ``listen`` says, asks for an API key, sees nothing of the user's llama.cpp settings, and writes its
    log to a file. ``name`` says in errors what it was to serve. Entering returns once it answers; raises
    ServerDiedError if it ends before, CancelledError once ``cancel`` is set, DynrunError if it is not ready after
    ``timeout_s`` seconds.
    """

    def __init__(
        self,
        options: Sequence[str | Path],
        *,
        name: str,
        listen: Listen = Listen(),
        environment: Mapping[str, str] | None = None,
        cancel: Event | None = None,
        timeout_s: float = 900.0,
    ) -> None:
        self.options, self.name, self.listen = tuple(map(str, options)), name, listen
        self.environment, self.timeout_s, self._cancel = dict(environment or {}), timeout_s, cancel
        self.log = new_log("llama-server")
        self.port = listen.port
        self.key_file = listen.key_file or cache_dir() / "keys" / f"{os.getpid()}-{secrets.token_hex(8)}"
        self.api_key = secrets.token_urlsafe(32) if listen.key_file is None else read_keys(listen.key_file)[0]
        self._log_start = 0
        self._child: subprocess.Popen[str] | None = None
        self._open = ExitStack()

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        return f"http://{reachable(self.listen.host)}:{self.port}"

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    def __enter__(self) -> Self:
        if self._child is not None:
            raise ValueError("a server is started once")
        with self._open:
            if self.listen.key_file is None:
                self._open.callback(self.key_file.unlink, missing_ok=True)
                write_key(self.key_file, self.api_key)
            sink = self._open.enter_context(_log_sink(self.log))
            argv = self._argv()
            sink.write(("$ " + " ".join(argv) + "\n").encode())
            sink.flush()
            self._log_start = sink.tell()
            self._child = self._open.enter_context(spawned(argv, env=self._environment(), stderr=sink))
            self._wait_until_ready()
            self._open = self._open.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server; its log stays."""
        self._open.close()

    def kill(self) -> None:
        """End the server at once, where nobody waits for its answers: asked politely, it completes them first."""
        assert self._child is not None
        self._child.kill()
        self._child.wait()

    def client(self) -> httpx2.Client:
        """A client with the server's URL and key."""
        return client(self.url, self.api_key)

    def death(self, *, within_s: float = _DYING_S) -> ServerDiedError | None:
        """Why the server died; None if it is still there after ``within_s`` seconds."""
        assert self._child is not None
        try:
            exit_code = self._child.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            return None
        text = self.log_text()
        return self.died(cause_of_death(text, exit_code), text)

    def died(self, death: Death, text: str) -> ServerDiedError:
        """``death`` as an error."""
        message, lines = f"llama-server with {self.name} died: {death.cause}", last_lines(text)
        if death.kind not in ("memory", "killed"):
            return ServerDiedError(message, fix=death.fix, log=self.log, lines=lines)
        error = ServerOutOfMemoryError(message, fix=death.fix, log=self.log, lines=lines)
        error.host = death.host
        return error

    def log_text(self) -> str:
        """What it has logged since its start; of a log of months the last megabytes."""
        with self.log.open("rb") as stream:
            stream.seek(max(self._log_start, self.log.stat().st_size - _LOG_BYTES))
            return stream.read(_LOG_BYTES).decode("utf-8", "replace")

    def _argv(self) -> list[str]:
        # Port 0: the system picks a free one and the server says which, so nobody can be faster.
        argv = [str(installation().program("llama-server")), *self.options]
        argv += ["--host", self.listen.host, "--port", str(self.listen.port), "--api-key-file", str(self.key_file)]
        return [*argv, "--cors-origins", "localhost", "--no-cors-credentials", "--no-ui", "--offline", "-lv", "4"]

    def _environment(self) -> dict[str, str]:
        # Away from the user's llama.cpp/config.ini, which sets any option that is not given (common/arg.cpp), and from
        # models that nobody named, which a router would offer (common/hf-cache.cpp).
        own = {"XDG_CONFIG_HOME": str(cache_dir() / "no-config"), "LLAMA_CACHE": str(cache_dir() / "no-models")}
        return scrubbed_environment(own | self.environment)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.timeout_s
        while time.monotonic() < deadline:
            if self._cancel is not None and self._cancel.is_set():
                raise CancelledError(f"the start of llama-server with {self.name} was cancelled")
            if (died := self.death(within_s=_POLL_S)) is not None:
                raise died
            # Said only once the model is loaded; before, every request is answered with 503.
            if listening := _LISTENING.search(self.log_text()):
                self.port = int(listening[1])
                if self._healthy():
                    return
        raise DynrunError(
            f"llama-server was not ready with {self.name} after {self.timeout_s:.0f} s", fix="see its log", log=self.log
        )

    def _healthy(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/health", timeout=5.0, trust_env=False).status_code == httpx2.codes.OK
        except httpx2.RequestError:  # also what cannot be decoded: somebody else's answer
            return False


class Server(LlamaServer):
    """A llama-server for one model and no particular placement.

    ``n_parallel`` requests are answered at once, each in a slot with ``n_ctx`` tokens of its own; ``n_ctx`` is capped
    to what the model was trained for. ``n_gpu_layers`` -1 lets llama.cpp fit the model to the devices' free memory.
    ``chat_template`` is a Jinja file that replaces the model's own; NotFoundError if it is no file.
    """

    def __init__(
        self,
        model: Path,
        *,
        n_threads: int,
        n_ctx: int = DEFAULT_N_CTX,
        n_gpu_layers: int = -1,
        n_parallel: int = 1,
        chat_template: Path | None = None,
        timeout_s: float = 900.0,
    ) -> None:
        header = read_header(model)
        trained = header.metadata.get(f"{header.architecture}.context_length")
        self.n_ctx = min(n_ctx, trained) if isinstance(trained, int) and trained > 0 else n_ctx
        options = ["-m", str(model)]
        # -c is divided among the slots unless they share one cache (-kvu), where one could starve the others
        # (src/llama-context.cpp); -np given, they do not share (tools/server/server.cpp).
        options += ["-c", str(self.n_ctx * n_parallel), "-np", str(n_parallel), "-t", str(n_threads)]
        # No user comes back to an earlier conversation: the cache of other prompts (8 GiB by default) has no use.
        options += [*template_options(chat_template), "--cache-ram", "0", "--no-cache-idle-slots"]
        if n_gpu_layers >= 0:
            # A given number of layers and llama.cpp's own fitting must not be mixed (common/fit.cpp).
            options += ["-ngl", str(n_gpu_layers), "--fit", "off"]
        super().__init__(options, name=model.name, timeout_s=timeout_s)


def template_options(chat_template: Path | None) -> list[str]:
    """Options for a Jinja file in the place of the model's own template. Raises NotFoundError where it is no file."""
    if chat_template is None:
        return []
    if not chat_template.is_file():
        raise NotFoundError(f"the chat template {chat_template} is no file", fix="check the path")
    return ["--jinja", "--chat-template-file", str(chat_template)]


def client(url: str, api_key: str) -> httpx2.Client:
    """A client for a server at ``url``. No proxy of the environment is asked: the server is this machine."""
    # Nothing is sent while a long prompt is read, except a ping every half minute (--sse-ping-interval).
    timeout = httpx2.Timeout(10.0, read=600.0)
    headers = {"Authorization": f"Bearer {api_key}"}
    return httpx2.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False)


def reachable(host: str) -> str:
    """The address by which this machine reaches a server that listens on ``host``."""
    if host in ("", "0.0.0.0", "::"):  # noqa: S104
        return LOOPBACK
    return f"[{host}]" if ":" in host else host


def write_key(path: Path, key: str) -> None:
    """A key that only this user can read."""
    with translated_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with suppress(FileNotFoundError):
            path.unlink()
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(f"{key}\n")


def read_keys(path: Path) -> list[str]:
    """The keys of a file, one a line. Raises NotFoundError where there is none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise NotFoundError(f"the key file {path} cannot be read: {error}", fix="check the path") from error
    if keys := [line for line in lines if line and not line.startswith("#")]:
        return keys
    raise NotFoundError(f"the key file {path} holds no key", fix="write one into it, one a line")


def _log_sink(log: Path) -> IO[bytes]:
    with translated_os_errors(log):
        return log.open("ab")
