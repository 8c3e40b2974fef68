"""Keys and tokens stay where they belong: not in `ps`, in no log, report or answer."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

from tests.commands import dynrun
from tests.hub_server import Hub, serving
from tests.native.test_serve import PATIENCE_S, ask, family, terminal
from tests.native.test_serve import serving as serve
from tests.tiny import write_tiny_llama

pytestmark = [pytest.mark.native, pytest.mark.skipif(sys.platform == "win32", reason="reads other processes")]
TOKEN = "hf_theSecretOfThisTest"
SMALL = (
    "--types",
    "Q4_K,Q6_K",
    "--tokens",
    "512",
    "--ctx",
    "128",
    "--probe-tokens",
    "64",
    "--eval-tokens",
    "256",
    "--candidates",
    "0",
)


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf", n_ctx_train=1024, n_block=1)


def files_with(secret: str, *folders: Path) -> list[Path]:
    """The files under ``folders`` that hold ``secret``."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return [path for path in files if secret.encode() in path.read_bytes()]


def own_folders(tmp_path: Path) -> tuple[Path, ...]:
    """Where commands of this test may write."""
    return tmp_path, *(Path(os.environ[name]) for name in ("DYNRUN_CACHE", "DYNRUN_DATA", "HF_HOME"))


def check_processes(processes: list[psutil.Process], key: str, *, in_environment: bool) -> None:
    """What `ps` shows to everybody, and what /proc shows to this user."""
    assert any(process.name() == "llama-server" for process in processes)
    for process in processes:
        assert key not in " ".join(process.cmdline())
        assert TOKEN not in " ".join(process.cmdline())
        environment = process.environ()
        assert TOKEN not in environment.values(), "llama.cpp needs no token"
        assert (key in environment.values()) <= in_environment


@pytest.mark.parametrize("several", [False, True], ids=["one model", "several"])
def test_the_key_of_serve_is_in_its_file_alone(tiny: Path, tmp_path: Path, several: bool) -> None:
    models = [tiny, write_tiny_llama(tmp_path / "other.gguf", n_ctx_train=512)] if several else [tiny]
    with serve(*models, "--ctx", "256") as (process, said):
        key_file = Path(said["api_key_file"])
        key = key_file.read_text().strip()
        assert len(key) >= 32
        assert not {key, TOKEN} & set(map(str, said.values()))
        assert ask(said, str(tiny)).status_code == 200
        assert ask(said, str(tiny), "wrong").status_code == 401
        assert key not in ask(said, str(tiny), "wrong").text
        # The children of llama.cpp's router take no file: theirs is the environment, which only this user sees.
        check_processes(family(process), key, in_environment=several)
    assert files_with(key, *own_folders(tmp_path)) == [key_file]
    assert files_with(TOKEN, *own_folders(tmp_path)) == []


def test_the_key_of_a_run_is_in_a_file_that_goes_with_it(tiny: Path, tmp_path: Path) -> None:
    with terminal("run", tiny, "-n", "8") as (user, process):
        said = user.wait_for("> ")
        user.type("hi\n")
        said += user.wait_for("answer: ")
        (server,) = [one for one in family(process) if one.name() == "llama-server"]
        arguments = server.cmdline()
        key_file = Path(arguments[arguments.index("--api-key-file") + 1])
        assert key_file.stat().st_mode & 0o777 == 0o600
        key = key_file.read_text().strip()
        check_processes(family(process), key, in_environment=False)
        said += user.wait_for("> ")
        user.type("/quit\n")
        assert process.wait(PATIENCE_S) == 0
    assert key not in said + TOKEN
    assert not key_file.exists()
    assert files_with(key, *own_folders(tmp_path)) == []
    assert files_with(TOKEN, *own_folders(tmp_path)) == []


def test_the_token_of_a_pull_is_nowhere_afterwards(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Hub(models={"o/m": {"m-F16.gguf": tiny.read_bytes()}})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        pulled = dynrun("pull", "o/m:F16", "--json")
        assert pulled.exit_code == 0, pulled.stderr
        missing = dynrun("pull", "o/m:Q9", "--json")
        assert missing.exit_code == 4
        made = dynrun("make", "o/m:F16", "--quant", "Q4_K_M", *SMALL, "--out", tmp_path / "made.gguf", "--json")
        assert made.exit_code == 0, made.stderr
    assert hub.tokens - {""} == {f"Bearer {TOKEN}"}
    assert not [ran for ran in (pulled, missing, made) if TOKEN in ran.stdout + ran.stderr]
    assert (tmp_path / "made.report").is_dir()
    assert files_with(TOKEN, *own_folders(tmp_path)) == []
