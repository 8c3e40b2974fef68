"""llama-server's deaths read out of its log, and how the child is started; the samples are real logs, shortened."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Timer

import pytest

from dynrun.cli.app import main
from dynrun.errors import DynrunError, NotFoundError
from dynrun.llamacpp.build import RECORD, installation
from dynrun.llamacpp.server import CancelledError, Listen, LlamaServer, Server, ServerDiedError, ServerOutOfMemoryError
from dynrun.llamacpp.server_log import cause_of_death, memory_ran_out
from tests.tiny import write_tiny_llama

START = """\
0.00.001.165 I srv  llama_server: initializing ...
0.00.002.987 I cmn  common_param: common_params_print_info: verbosity = 3 (adjust with the `-lv N` CLI arg)
0.00.004.688 I srv    load_model: loading model 'tiny.gguf'
"""
LOAD_FAILED = """\
0.00.005.741 E llama_model_load_from_file_impl: failed to load model
0.00.005.778 E common_fit_params: error while trying to fit params to free device memory: failed to load model
0.00.005.894 E cmn  common_init_: failed to load model 'tiny.gguf'
0.00.005.897 E srv    load_model: failed to load model, 'tiny.gguf'
0.00.005.899 I srv    operator(): operator(): cleaning up before exit...
0.00.006.288 E srv  llama_server: exiting due to model loading error
"""
TRUNCATED = (
    "0.00.005.727 E llama_model_load: error loading model: tensor 'blk.0.ffn_up.weight' data is not within the file "
    "bounds, model is corrupted or incomplete\n"
)
ARCHITECTURE = "0.00.013.686 E llama_model_load: error loading model: unknown model architecture: 'lxama'\n"
KV_CACHE = """\
0.00.007.081 W llama_context: n_ctx_seq (400000000) > n_ctx_train (2048) -- possible training context overflow
0.35.805.705 E ggml_aligned_malloc: insufficient memory (attempted to allocate 390625.00 MB)
0.35.805.720 E ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 409600000000
0.35.805.721 E alloc_tensor_range: failed to allocate CPU buffer of size 409600000000
0.37.274.117 E llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache
0.37.274.137 E cmn  common_init_: failed to create context with model 'tiny.gguf'
0.37.274.499 E srv  llama_server: exiting due to model loading error
"""
CUDA = (
    "0.02.100.000 E ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9000.00 MiB on device 0: cudaMalloc failed: "
    "out of memory\n"
)
ABORT_IN_MEMORY = """\
/src/ggml/src/ggml.c:1644: GGML_ASSERT(ctx->mem_buffer != NULL) failed
0.00.048.359 E ggml_aligned_malloc: insufficient memory (attempted to allocate  19.73 MB)
"""
LONE_ASSERTION = "/src/ggml/src/ggml.c:1644: GGML_ASSERT(ctx->mem_buffer != NULL) failed\n"
RPC_MEMORY = "0.01.000.000 E alloc_tensor_range: failed to allocate RPC0[127.0.0.1:50052] buffer of size 104857600\n"
RPC_DEAD = "/src/ggml-rpc.cpp:566: Remote RPC server crashed or returned malformed response\n"
# As seen on a loaded machine: the line of the abort never came.
RPC_HUNG_UP = "0.00.417.331 E recv failed (bytes_recv=0, size_to_recv=8)\n"
ABORT = "/src/ggml/src/ggml-quants.c:4112: GGML_ASSERT(besti1 >= 0 && besti2 >= 0 && best_k >= 0) failed\n"
TEMPLATE = """\
error: the supplied chat template is not supported: {% for m in
0.00.001.240 E common_chat_templates_init: error: parser: Parser Error: Unexpected EOF
0.00.001.240 E common_chat_templates_init: failed to initialize chat template
0.00.001.251 E common_chat_verify_template: failed to apply template: std::exception
"""
BIND = """\
0.00.003.241 E srv         start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 18124
0.00.003.330 E srv  llama_server: exiting due to HTTP server error
"""


@pytest.mark.parametrize(
    ("log", "exit_code", "kind", "words"),
    [
        pytest.param(KV_CACHE, 1, "memory", "insufficient memory (attempted to allocate 390625.00 MB)", id="kv-cache"),
        pytest.param(CUDA + LOAD_FAILED, 1, "memory", "cudaMalloc failed", id="device-memory"),
        pytest.param(ABORT_IN_MEMORY, -6, "memory", "insufficient memory", id="aborted-without-memory"),
        pytest.param(LONE_ASSERTION, -6, "memory", "ctx->mem_buffer", id="aborted-without-memory-or-words"),
        pytest.param(TRUNCATED + LOAD_FAILED, 1, "model", "'blk.0.ffn_up.weight' data is not within", id="truncated"),
        pytest.param(ARCHITECTURE + LOAD_FAILED, 1, "model", "unknown model architecture: 'lxama'", id="architecture"),
        pytest.param("", -9, "killed", "SIGKILL", id="killed"),
        pytest.param(ABORT, -6, "aborted", "GGML_ASSERT(besti1 >= 0", id="aborted"),
        pytest.param("", -6, "aborted", "SIGABRT", id="aborted-silently"),
        pytest.param("", -11, "other", "SIGSEGV", id="crashed"),
        pytest.param(TEMPLATE, 1, "other", "the chat template is of no use: parser: Parser Error", id="template"),
        pytest.param(BIND, 1, "other", "couldn't bind HTTP server socket", id="port"),
        pytest.param("error: invalid argument: --nosuch\n", 1, "other", "invalid argument: --nosuch", id="argument"),
        pytest.param("", 3, "other", "exit code 3", id="silent"),
    ],
)
def test_the_cause_of_a_death_is_read_from_the_log(log: str, exit_code: int, kind: str, words: str) -> None:
    death = cause_of_death(START + log, exit_code)
    assert (death.kind, words in death.cause) == (kind, True), death
    assert death.fix
    assert "\n" not in death.cause


@pytest.mark.parametrize(
    ("log", "exit_code", "host"),
    [(KV_CACHE, 1, True), (CUDA + LOAD_FAILED, 1, False), (RPC_MEMORY + LOAD_FAILED, 1, False), ("", -9, True)],
)
def test_whether_the_ram_or_a_device_ran_out_is_read_from_the_log(log: str, exit_code: int, host: bool) -> None:
    assert cause_of_death(START + log, exit_code).host is host


@pytest.mark.parametrize("log", [RPC_DEAD, RPC_HUNG_UP, RPC_HUNG_UP + RPC_DEAD])
def test_a_dead_rpc_server_is_named_with_what_to_do(log: str) -> None:
    death = cause_of_death(START + log, -6)
    assert death.kind == "aborted"
    assert "Remote RPC server" in death.cause
    assert "start the RPC server again" in death.fix


def test_a_server_that_lives_on_without_memory_is_known_by_its_log() -> None:
    assert memory_ran_out(START + TRUNCATED) is None
    death = memory_ran_out(START + CUDA)
    assert death is not None
    assert death.kind == "memory"


def test_a_warning_about_memory_is_no_death_by_memory() -> None:
    warning = "0.00.007.081 W alloc: failed to allocate a pinned buffer of size 100, going on without\n"
    assert cause_of_death(warning + TRUNCATED + LOAD_FAILED, 1).kind == "model"


FakeServer = Callable[[str], None]


@pytest.fixture
def llama_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """Installs a program of the test's own as llama-server."""
    if sys.platform == "win32":
        pytest.skip("needs a shell script as program")
    program = tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    record = {"bin": str(program.parent), "fingerprint": "f", "backend": "cpu", "commit": "0c1e570"}
    (tmp_path / RECORD).write_text(json.dumps(record))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    installation.cache_clear()

    def install(script: str) -> None:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    yield install
    installation.cache_clear()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf", n_ctx_train=512)


@pytest.mark.parametrize(
    ("script", "error", "words", "exit_code"),
    [
        ("kill -9 $$", ServerOutOfMemoryError, "SIGKILL", 5),
        ("echo 'ggml.c:1: GGML_ASSERT(a) failed' >&2; kill -6 $$", ServerDiedError, "GGML_ASSERT", 1),
        ("echo nonsense; exit 7", ServerDiedError, "exit code 7", 1),
    ],
)
def test_a_server_that_dies_at_start_says_why(
    llama_server: FakeServer, model: Path, script: str, error: type[DynrunError], words: str, exit_code: int
) -> None:
    llama_server(script)
    with pytest.raises(error, match=words) as caught, Server(model, n_threads=1):
        pass
    assert caught.value.exit_code == exit_code
    assert caught.value.log is not None
    assert "tiny.gguf" in caught.value.log.read_text()
    last = caught.value.last_lines
    assert last == () or words in last[-1] or "nonsense" in last[-1]


def test_a_server_that_never_gets_ready_is_ended(llama_server: FakeServer, model: Path, tmp_path: Path) -> None:
    llama_server(f"echo $$ > {tmp_path}/pid; exec sleep 60")
    with pytest.raises(DynrunError, match="not ready"), Server(model, n_threads=1, timeout_s=0.5):
        pass
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_key_is_in_a_private_file_and_not_in_the_arguments(
    llama_server: FakeServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "7")
    monkeypatch.setenv("HF_TOKEN", "secret")
    copy = f'while [ "$1" != --api-key-file ]; do shift; done; cp -p "$2" {tmp_path}/key'
    llama_server(f'env > {tmp_path}/env; echo "$@" > {tmp_path}/argv; {copy}; exit 1')
    server = Server(model, n_threads=1, n_ctx=4096)
    with pytest.raises(ServerDiedError), server:
        pass
    environment, argv = (tmp_path / "env").read_text(), (tmp_path / "argv").read_text()
    assert (tmp_path / "key").read_text() == f"{server.api_key}\n"
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert not server.key_file.exists(), "it is removed with the server"
    assert "LLAMA_ARG" not in environment
    assert "secret" not in environment
    assert server.api_key not in argv + environment + server.log.read_text()
    assert "--host 127.0.0.1 " in argv
    assert "-c 512 " in argv, "the context is capped to what the model was trained for"


def test_a_key_file_of_the_user_is_used_and_kept(llama_server: FakeServer, tmp_path: Path) -> None:
    llama_server("exit 1")
    keys = tmp_path / "keys"
    keys.write_text("# of the team\n\nopen sesame\nanother\n")
    server = LlamaServer([], name="x", listen=Listen("0.0.0.0", 4711, keys))  # noqa: S104
    assert (server.api_key, server.url) == ("open sesame", "http://127.0.0.1:4711")
    with pytest.raises(ServerDiedError), server:
        pass
    assert keys.read_text().startswith("# of the team")


@pytest.mark.parametrize("text", [None, "", "# nothing\n"])
def test_a_key_file_without_a_key_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "keys").write_text(text)
    with pytest.raises(NotFoundError, match="key"):
        LlamaServer([], name="x", listen=Listen(key_file=tmp_path / "keys"))


def test_a_start_that_is_cancelled_ends_the_server(llama_server: FakeServer, tmp_path: Path) -> None:
    llama_server(f"echo $$ > {tmp_path}/pid; exec sleep 60")
    cancel = Event()
    Timer(0.3, cancel.set).start()
    with pytest.raises(CancelledError) as caught, LlamaServer([], name="x", cancel=cancel):
        pass
    assert caught.value.exit_code == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_each_of_several_slots_gets_the_context_asked_for(
    llama_server: FakeServer, model: Path, tmp_path: Path
) -> None:
    llama_server(f'echo "$@" > {tmp_path}/argv; exit 1')
    with pytest.raises(ServerDiedError), Server(model, n_threads=1, n_ctx=256, n_parallel=8):
        pass
    argv = (tmp_path / "argv").read_text()
    assert "-c 2048 -np 8 " in argv
    assert "--chat-template-file" not in argv


def test_a_chat_template_that_is_no_file_is_refused_before_the_start(model: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no file"):
        Server(model, n_threads=1, chat_template=tmp_path)


def test_every_server_has_a_key_of_its_own(model: Path) -> None:
    assert Server(model, n_threads=1).api_key != Server(model, n_threads=1).api_key


def test_run_shows_the_last_lines_of_a_server_that_died(
    llama_server: FakeServer, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    llama_server("echo 'loading tensors'; echo 'error: the moon is full' >&2; exit 7")
    assert main(["run", str(model), "-p", "x"]) == 1
    err = capsys.readouterr().err
    assert "  | error: the moon is full" in err
    *_, last = err.splitlines()
    assert last.startswith("dynrun: llama-server with tiny.gguf died: it ended with exit code 7: the moon")
    assert "see its log" in last
