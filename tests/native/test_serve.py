"""`serve` and `run` as a user starts them: in processes and terminals of their own; nothing outlives them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from dynrun.runtime.history import list_chats
from dynrun.runtime.served import find_served
from tests.commands import ARGV, dynrun
from tests.tiny import write_tiny_llama

pytestmark = [pytest.mark.native, pytest.mark.skipif(sys.platform == "win32", reason="needs signals and terminals")]
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", n_ctx_train=1024)


@contextmanager
def serving(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A `dynrun serve --json`, and what it says once it answers."""
    argv = [*ARGV, "serve", *map(str, arguments), "--port", "0", "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, "it ended before it answered"
            yield process, json.loads(line)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_S)


def ask(said: dict[str, Any], model: str, key: str | None = None) -> httpx2.Response:
    own = Path(said["api_key_file"]).read_text().strip()
    body = {"model": model, "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 4}
    headers = {"Authorization": f"Bearer {own if key is None else key}"}
    url = f"{said['url']}/v1/chat/completions"
    return httpx2.post(url, json=body, headers=headers, timeout=PATIENCE_S, trust_env=False)


def family(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_a_model_is_served_to_its_key_and_run_uses_the_server(model: Path) -> None:
    with serving(model, "--ctx", "512") as (process, said):
        assert said["url"].startswith("http://127.0.0.1:")
        assert Path(said["api_key_file"]).stat().st_mode & 0o777 == 0o600
        assert ask(said, "any").json()["usage"]["completion_tokens"] == 4
        assert ask(said, "any", "wrong").status_code == httpx2.codes.UNAUTHORIZED
        (server,) = [child for child in family(process) if child.name() == "llama-server"]
        found = find_served(model)
        assert found is not None
        assert (found.url, found.n_ctx) == (said["url"], 512)
        assert find_served(model, 1024) is None, "it has less context than is wished"
        ran = dynrun("run", model, "-p", "hi", "-n", "3", "--json")
        assert "dynrun serve" in ran.stderr
        assert ran.json["timings"]["predicted_n"] == 3
        assert ran.json["placement"] == {}
    assert process.returncode == 0
    assert not server.is_running()
    assert find_served(model) is None


def test_several_models_are_served_by_name_each_with_the_key(model: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other.gguf", n_ctx_train=512, seed=1)
    keys = tmp_path / "keys"
    keys.write_text("open sesame\n")
    with serving(model, other, "--ctx", "256", "--api-key-file", keys) as (process, said):
        for name in map(str, (model, other)):
            answer = ask(said, name)
            assert answer.status_code == httpx2.codes.OK, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 4
        assert ask(said, str(model), "wrong").status_code == httpx2.codes.UNAUTHORIZED
        children = [child for child in family(process) if child.name() == "llama-server"]
        ports = {c.laddr.port for child in children for c in child.net_connections() if c.status == "LISTEN"}
        assert len(ports) == 2, "the router, and of the models the last one asked"
        for port in ports:
            answer = httpx2.get(f"http://127.0.0.1:{port}/slots", trust_env=False)
            assert answer.status_code == httpx2.codes.UNAUTHORIZED, "a model's own server needs the key too"
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=PATIENCE_S)
        assert alive == [], "the router and its children end with dynrun, even with kill -9"


def test_nothing_is_left_of_a_run_that_is_killed(model: Path) -> None:
    for _ in range(3):
        with subprocess.Popen(
            [*ARGV, "run", str(model), "-p", "x"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            servers = [child for child in psutil.Process(process.pid).children() if child.name() == "llama-server"]
            process.kill()
        _, alive = psutil.wait_procs(servers, timeout=PATIENCE_S)
        assert alive == []


class Typist:
    """Somebody at the terminal of a running command."""

    def __init__(self, terminal: int) -> None:
        self.terminal, self.seen = terminal, ""

    def wait_for(self, text: str) -> str:
        """What is on the screen up to ``text``; it is gone from there then."""
        while text not in self.seen:
            ready, _, _ = select.select([self.terminal], [], [], PATIENCE_S)
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self.terminal, 4096).decode("utf-8", "replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def wait_for_more(self) -> None:
        """Whatever comes next is on the screen."""
        while not self.seen:
            ready, _, _ = select.select([self.terminal], [], [], PATIENCE_S)
            assert ready, "nothing comes"
            self.seen += os.read(self.terminal, 4096).decode("utf-8", "replace")

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())


@contextmanager
def terminal(*arguments: str | Path) -> Iterator[tuple[Typist, subprocess.Popen[bytes]]]:
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1"}
    ends: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    argv = [*ARGV, *map(str, arguments)]
    with subprocess.Popen(argv, **ends, env=environment, start_new_session=True, preexec_fn=_controlled) as process:  # noqa: PLW1509
        os.close(theirs)
        try:
            yield Typist(ours), process
        finally:
            process.kill()
            process.wait()
            os.close(ours)


def _controlled() -> None:
    """Make standard input the controlling terminal, so that Ctrl+C is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_chat_in_a_terminal(tmp_path: Path) -> None:
    slow = write_tiny_llama(tmp_path / "slow.gguf", n_embd=512, n_ff=1024, n_block=3, n_ctx_train=4096)
    with terminal("run", slow, "--temp", "0", "-n", "6") as (user, process):
        user.wait_for("Ctrl+D ends")
        user.wait_for("> ")
        user.type("the cat\n")
        user.wait_for("answer: 6 tokens")
        user.type("/set max_tokens 4000\n")
        user.wait_for("tokens of context; temperature 0")
        # What is typed before the prompt is echoed by the terminal too, before what the command still has to say.
        user.wait_for("> ")
        user.type("and then?\n")
        user.wait_for("and then?")
        # The first of the answer is there: stop it.
        user.wait_for("\n")
        user.wait_for_more()
        user.type("\x03")
        user.wait_for("stopped; prompt")
        user.wait_for("> ")
        user.type("/retry\n")
        user.wait_for("\n")
        user.wait_for_more()
        user.type("\x03")
        user.wait_for("stopped; prompt")
        user.wait_for("> ")
        user.type("\x04")
        assert process.wait(PATIENCE_S) == 0
    (kept,) = list_chats()
    assert [message.role for message in kept.messages] == ["user", "assistant"] * 2
    assert [message.stop for message in kept.messages] == ["end", "length", "end", "cancelled"]
    with terminal("run", slow, "--resume", "last", "-n", "3") as (user, process):
        user.wait_for("going on with")
        user.wait_for("> ")
        user.type("/new\n")
        user.wait_for("a new conversation")
        user.type("/nonsense\n")
        user.wait_for("there is no /nonsense")
        user.type("/quit\n")
        assert process.wait(PATIENCE_S) == 0
