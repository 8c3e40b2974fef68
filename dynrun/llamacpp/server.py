"""A llama-server child: started, waited for, stopped; its death told with its cause.

Takes a model file, gives a URL and an API key for as long as the ``with`` block lasts. A crash or an out-of-memory in
the child never takes dynrun down. Does not know chats or prompts: that is runtime/.
"""

from __future__ import annotations

import re
import secrets
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

import httpx

from dynrun.artifacts import translated_os_errors
from dynrun.errors import DoesNotFitError, DynrunError, NotFoundError
from dynrun.gguf.header import read_header
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.process import exit_reason, new_log, scrubbed_environment, spawned
from dynrun.paths import cache_dir

DEFAULT_N_CTX = 4096
_HOST = "127.0.0.1"
_POLL_S = 0.05
# How long a broken connection may be ahead of the end of the process that broke it (a core dump takes its time).
_DYING_S = 10.0

Kind = Literal["memory", "model", "killed", "aborted", "other"]


class ServerDiedError(DynrunError):
    """llama-server ended by itself; the message names the cause."""


class ServerOutOfMemoryError(ServerDiedError, DoesNotFitError):
    """llama-server ended because memory ran out."""


@dataclass(frozen=True)
class Death:
    """Why a server ended: ``cause`` in words, what to do, and the kind."""

    cause: str
    fix: str
    kind: Kind


# "0.00.005.166 E gguf_init_from_file: failed to open …" (common/log.cpp); aborts and loader errors come without prefix.
_LINE = re.compile(r"^\d+\.\d\d\.\d{3}\.\d{3} ([A-Z]) (.*)$")
_FUNCTION = re.compile(r"^(?:(?:srv|cmn|slot) +)?[\w ()]+?: (?:error(?: loading model)?: )?")
_LISTENING = re.compile(rf"^\S+ I srv +llama_server: listening on http://{re.escape(_HOST)}:(\d+)$", re.MULTILINE)
_MEMORY = re.compile(
    r"cudaMalloc failed|out of memory|insufficient memory|OutOfDeviceMemory|bad_alloc|cannot allocate memory"
    r"|failed to allocate .*buffer|unable to allocate",
    re.IGNORECASE,
)
_ABORT = re.compile(r"GGML_ASSERT|GGML_ABORT|CUDA error|terminate called|what\(\):")
_MALFORMED = re.compile(r"invalid magic|corrupted or incomplete|not within the file bounds|failed to read")
_TEMPLATE = re.compile(r"common_chat_templates_init: error: |failed to apply template: ")
_SMALLER = "use a smaller context (--ctx), a smaller quant, or free some memory"


def cause_of_death(log_text: str, exit_code: int) -> Death:
    """Read the cause out of a server's log; ``exit_code`` as subprocess gives it, negative for a signal.

    The messages are those of llama.cpp's src/llama.cpp, src/llama-model-loader.cpp, ggml/src/ggml-backend.cpp and
    tools/server/server.cpp.
    """
    errors = _error_lines(log_text)
    if memory := next((line for line in errors if _MEMORY.search(line)), None):
        return Death(f"memory ran out: {_plain(memory)}", _SMALLER, "memory")
    if "failed to load model" in log_text:
        # The first error says what is wrong with the file, the later ones only that it was not loaded.
        reason = _plain(errors[0]) if errors else "no reason given"
        return Death(f"the model could not be loaded: {reason}", _model_fix(reason), "model")
    if "supplied chat template is not supported" in log_text:
        reason = next((_plain(line) for line in errors if _TEMPLATE.search(line)), "no reason given")
        return Death(f"the chat template is of no use: {reason}", "correct the template or leave it out", "other")
    if exit_code == -9:
        cause = "it was killed (SIGKILL), probably by the system because the machine's memory ran out"
        return Death(cause, _SMALLER, "killed")
    if exit_code == -6:
        last_words = next((line for line in errors if _ABORT.search(line)), errors[-1] if errors else "no reason given")
        return Death(f"it aborted (SIGABRT): {_plain(last_words)}", "report it with the log", "aborted")
    telling = [line for line in errors if "exiting due to" not in line]
    last = f": {_plain(telling[-1])}" if telling else ""
    return Death(f"it ended with {exit_reason(exit_code)}{last}", "see its log", "other")


def _error_lines(log_text: str) -> list[str]:
    """Lines of level E and, of those without a level, the ones that speak of a fault."""
    found = []
    for line in log_text.splitlines():
        match = _LINE.match(line)
        if match and match[1] == "E":
            found.append(match[2].strip())
        elif not match and re.search(
            r"error|fail|assert|abort|terminate|what\(\)|bad_alloc|memory", line, re.IGNORECASE
        ):
            found.append(line.strip())
    return found


def _plain(line: str) -> str:
    return _FUNCTION.sub("", line, count=1)[:300]


def _model_fix(reason: str) -> str:
    if "unknown model architecture" in reason:
        return "the pinned llama.cpp does not know this architecture"
    return "download or make the file again" if _MALFORMED.search(reason) else "see its log"


class Server:
    """A llama-server for one model and one user, on 127.0.0.1 with a key of its own; a context manager.

    ``n_parallel`` requests are answered at once, each in a slot with ``n_ctx`` tokens of its own; ``n_ctx`` is capped
    to what the model was trained for. ``n_gpu_layers`` -1 lets llama.cpp fit the model to the devices' free memory.
    ``chat_template`` is a Jinja file that replaces the model's own; NotFoundError if it is no file. Entering returns
    once the server answers; raises ServerDiedError if it ends before, DynrunError if it is not ready after
    ``timeout_s`` seconds.
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
        self.model, self.n_threads, self.n_gpu_layers, self.timeout_s = model, n_threads, n_gpu_layers, timeout_s
        self.n_parallel = n_parallel
        if chat_template is not None and not chat_template.is_file():
            raise NotFoundError(f"the chat template {chat_template} is no file", fix="check the path")
        self.chat_template = chat_template
        header = read_header(model)
        trained = header.metadata.get(f"{header.architecture}.context_length")
        self.n_ctx = min(n_ctx, trained) if isinstance(trained, int) and trained > 0 else n_ctx
        self.api_key = secrets.token_urlsafe(32)
        self.log = new_log("llama-server")
        self.port = 0
        self._log_start = 0
        self._child: subprocess.Popen[str] | None = None
        self._open = ExitStack()

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self.port}"

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    def __enter__(self) -> Self:
        with self._open:
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

    def client(self) -> httpx.Client:
        """A client with the server's URL and key. No proxy of the environment is asked: the server is this machine."""
        # Nothing is sent while a long prompt is read, except a ping every half minute (--sse-ping-interval).
        timeout = httpx.Timeout(10.0, read=600.0)
        headers = {"Authorization": f"Bearer {self.api_key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=False)

    def death(self, *, within_s: float = _DYING_S) -> ServerDiedError | None:
        """Why the server died; None if it is still there after ``within_s`` seconds."""
        assert self._child is not None
        try:
            exit_code = self._child.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            return None
        death = cause_of_death(self._log_text(), exit_code)
        error = ServerOutOfMemoryError if death.kind in ("memory", "killed") else ServerDiedError
        return error(f"llama-server with {self.model.name} died: {death.cause}", fix=death.fix, log=self.log)

    def _argv(self) -> list[str]:
        # Port 0: the system picks a free one and the server says which, so nobody can be faster.
        argv = [str(installation().program("llama-server")), "-m", str(self.model), "--host", _HOST, "--port", "0"]
        # -c is divided among the slots unless they share one cache (-kvu), where one could starve the others
        # (src/llama-context.cpp); -np given, they do not share (tools/server/server.cpp).
        argv += ["-c", str(self.n_ctx * self.n_parallel), "-np", str(self.n_parallel), "-t", str(self.n_threads)]
        if self.chat_template is not None:
            argv += ["--jinja", "--chat-template-file", str(self.chat_template)]
        # No user comes back to an earlier conversation: the cache of other prompts (8 GiB by default) has no use.
        argv += ["--cache-ram", "0", "--no-cache-idle-slots"]
        argv += ["--cors-origins", "localhost", "--no-cors-credentials", "--no-ui", "--offline", "-lv", "3"]
        if self.n_gpu_layers >= 0:
            # A given number of layers and llama.cpp's own fitting must not be mixed (common/fit.cpp).
            argv += ["-ngl", str(self.n_gpu_layers), "--fit", "off"]
        return argv

    def _environment(self) -> dict[str, str]:
        return scrubbed_environment(
            {
                "LLAMA_API_KEY": self.api_key,
                # An abort must not start a debugger on the dying process.
                "GGML_NO_BACKTRACE": "1",
                # Away from the user's llama.cpp/config.ini, which sets any option not given above (common/arg.cpp).
                "XDG_CONFIG_HOME": str(cache_dir() / "no-config"),
            }
        )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.timeout_s
        while time.monotonic() < deadline:
            if (died := self.death(within_s=_POLL_S)) is not None:
                raise died
            # Said only once the model is loaded; before, every request is answered with 503.
            if listening := _LISTENING.search(self._log_text()):
                self.port = int(listening[1])
                if self._healthy():
                    return
        raise DynrunError(
            f"llama-server was not ready with {self.model.name} after {self.timeout_s:.0f} s",
            fix="see its log",
            log=self.log,
        )

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5.0, trust_env=False).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def _log_text(self) -> str:
        with self.log.open("rb") as stream:
            stream.seek(self._log_start)
            return stream.read().decode("utf-8", "replace")


def _log_sink(log: Path) -> IO[bytes]:
    with translated_os_errors(log):
        return log.open("ab")
