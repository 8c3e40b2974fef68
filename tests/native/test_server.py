"""A real llama-server on a tiny model: started, asked, killed; and `doctor` on top of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

from dynrun.cli.app import main
from dynrun.llamacpp.build import RECORD, installation
from dynrun.llamacpp.server import Server, ServerDiedError, ServerOutOfMemoryError
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", n_ctx_train=1024)


def test_a_server_answers_its_key_only_and_is_gone_afterwards(model: Path) -> None:
    with Server(model, n_threads=1) as server:
        pid = server.pid
        with server.client() as client:
            assert client.get("/v1/models").status_code == httpx2.codes.OK
        assert httpx2.get(f"{server.url}/v1/models", trust_env=False).status_code == httpx2.codes.UNAUTHORIZED
        assert server.url.startswith("http://127.0.0.1:")
        assert server.api_key not in " ".join(psutil.Process(pid).cmdline())
        assert server.death(within_s=0) is None
    assert not psutil.pid_exists(pid)
    assert "listening on" in server.log.read_text()


def test_two_servers_at_once_have_ports_of_their_own(model: Path) -> None:
    with Server(model, n_threads=1) as one, Server(model, n_threads=1) as other:
        assert one.port != other.port
        for server in (one, other):
            with server.client() as client:
                assert client.get("/v1/models").status_code == httpx2.codes.OK


def test_another_site_is_not_allowed_in_by_cors(model: Path) -> None:
    with Server(model, n_threads=1) as server, server.client() as client:
        headers = client.get("/v1/models", headers={"Origin": "https://example.org"}).headers
        assert headers.get("access-control-allow-origin", "") not in ("*", "https://example.org")


def test_settings_and_proxies_of_the_user_do_not_reach_the_server(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ARG_N_PREDICT", "1")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "config.ini").write_text("[*]\nn-predict = 1\nlog-disable = true\n")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with Server(model, n_threads=1) as server, server.client() as client:
        assert "config.ini" not in server.log.read_text()
        done = client.post("/completion", json={"prompt": "the", "n_predict": -1, "ignore_eos": True, "temperature": 0})
        assert done.json()["tokens_predicted"] > 1


def test_the_context_is_capped_to_what_the_model_was_trained_for(model: Path) -> None:
    with Server(model, n_threads=1, n_ctx=100_000) as server, server.client() as client:
        assert client.get("/props").json()["default_generation_settings"]["n_ctx"] == 1024


def test_slots_have_contexts_of_their_own_and_the_template_that_is_given(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    with (
        Server(model, n_threads=1, n_ctx=512, n_parallel=3, chat_template=template) as server,
        server.client() as client,
    ):
        properties = client.get("/props").json()
        assert (properties["total_slots"], properties["default_generation_settings"]["n_ctx"]) == (3, 512)
        asked = {"messages": [{"role": "user", "content": "a"}]}
        assert client.post("/apply-template", json=asked).json()["prompt"] == "[a]"


def test_a_model_of_unknown_architecture_is_named_as_the_cause(model: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(model.read_bytes().replace(b"llama", b"lxama"))
    with (
        pytest.raises(ServerDiedError, match="unknown model architecture: 'lxama'") as caught,
        Server(strange, n_threads=1),
    ):
        pass
    assert caught.value.exit_code == 1


@pytest.fixture
def little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """llama-server with 400 MB of address space."""
    if sys.platform != "linux":
        pytest.skip("needs ulimit -v")
    real = installation()
    program = tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nulimit -v 400000\nexec "{real.program("llama-server")}" "$@"\n')
    program.chmod(0o755)
    record = {"bin": str(program.parent), "fingerprint": "f", "backend": real.backend, "commit": real.commit}
    (tmp_path / RECORD).write_text(json.dumps(record))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    installation.cache_clear()
    yield
    installation.cache_clear()


def test_running_out_of_memory_is_named_as_the_cause(little_memory: None, tmp_path: Path) -> None:
    # 1 KiB of KV cache a token: 1 GiB.
    wide = write_tiny_llama(tmp_path / "wide.gguf", n_ctx_train=1 << 20)
    with (
        pytest.raises(ServerOutOfMemoryError, match="memory ran out") as caught,
        Server(wide, n_threads=1, n_ctx=1 << 20),
    ):
        pass
    assert caught.value.exit_code == 5
    assert "--ctx" in caught.value.fix


def test_doctor_finds_a_whole_installation(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    # Room on the disk and in memory is this machine's affair.
    broken = [check for check in report["checks"] if not check["ok"] and check["name"] not in ("disk", "memory")]
    assert broken == []
    assert report["llama_cpp"] == {"commit": installation().commit, "backend": installation().backend}
    assert report["devices"][-1]["name"] == "CPU"
