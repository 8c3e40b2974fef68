"""`dynrun pull`, and what `ls`, `show`, `rm` and other commands then know of the model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dynrun.cli.app import main
from dynrun.cli.pull import InterruptedPullError
from tests.commands import ARGV, dynrun
from tests.hub_server import Fault, Hub, digest, serving_here
from tests.tiny import write_tiny_llama

REPOSITORY = "unsloth/Tiny-1B-Instruct-GGUF"
SCOUT = f"{REPOSITORY}:UD-IQ2_XXS"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "t.gguf", n_embd=64, n_ff=64, n_block=1).read_bytes()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: bytes) -> Iterator[Hub]:
    with serving_here(monkeypatch, tmp_path) as served:
        served.models[REPOSITORY] = {
            "UD-IQ2_XXS/Tiny-UD-IQ2_XXS.gguf": model,
            "Tiny-Q4_K_M.gguf": model + b"\0",
            "mmproj-F16.gguf": b"mmproj",
            "README.md": b"# Tiny",
        }
        yield served


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_a_partial_name_ends_in_a_checked_file(hub: Hub, capsys: pytest.CaptureFixture[str], model: bytes) -> None:
    code, out, err = run(capsys, "pull", "unsloth/Tiny", "--quant", "IQ2_XXS")
    assert code == 0
    path = Path(out.strip())
    assert path.read_bytes() == model
    assert f"there is no unsloth/Tiny; taking {REPOSITORY}\n" in err
    assert f"{SCOUT}: 0.1 MB, commit {hub.commit(REPOSITORY, 'models')[:8]}\n" in err
    assert "mmproj-F16.gguf (0.0 MB) lets the model see images: add --mmproj" in err
    assert f"run it: dynrun run {SCOUT}" in err


def test_json_says_what_came(hub: Hub, capsys: pytest.CaptureFixture[str], model: bytes) -> None:
    said = as_json(capsys, "pull", REPOSITORY, "--quant", "Q4_K_M", "--mmproj")
    assert said["name"] == f"{REPOSITORY}:Q4_K_M"
    assert said["resumed_bytes"] == 0
    assert said["elapsed_s"] > 0
    assert [(file["size_bytes"], file["sha256"]) for file in said["files"]] == [
        (len(model) + 1, digest(model + b"\0")),
        (6, digest(b"mmproj")),
    ]


def test_several_quants_off_a_terminal_are_exit_code_2(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "pull", REPOSITORY)
    assert (code, out) == (2, "")
    assert f"dynrun: {REPOSITORY} has several: Q4_K_M, UD-IQ2_XXS — choose one with --quant" in err.replace(
        "UD-IQ2_XXS, Q4_K_M", "Q4_K_M, UD-IQ2_XXS"
    )
    assert run(capsys, "pull", REPOSITORY, "--quant", "IQ2")[0] == 4
    assert not hub.served


def test_a_dry_run_fetches_nothing(hub: Hub, capsys: pytest.CaptureFixture[str], model: bytes) -> None:
    said = as_json(capsys, "pull", SCOUT, "--dry-run")
    assert said["download_bytes"] == len(model)
    assert not said["files"][0]["here"]
    assert not hub.served
    as_json(capsys, "pull", SCOUT)
    again = as_json(capsys, "pull", SCOUT, "--dry-run")
    assert (again["download_bytes"], again["files"][0]["here"]) == (0, True)


def test_a_pulled_model_is_listed_shown_and_resolved(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    path = as_json(capsys, "pull", SCOUT)["files"][0]["path"]
    as_json(capsys, "pull", f"{REPOSITORY}:Q4_K_M")
    listed = {row["name"]: row for row in as_json(capsys, "ls")["models"]}
    assert set(listed) == {SCOUT, f"{REPOSITORY}:Q4_K_M"}
    assert (listed[SCOUT]["path"], listed[SCOUT]["architecture"], listed[SCOUT]["quant"]) == (
        path,
        "llama",
        "UD-IQ2_XXS",
    )
    # As the user wrote it, without the ending of the sibling, in any case.
    shown = as_json(capsys, "show", "Unsloth/Tiny-1B-Instruct:iq2_xxs")
    assert (shown["path"], shown["name"]) == (path, "Tiny-UD-IQ2_XXS")
    code, _, err = run(capsys, "show", REPOSITORY)
    assert code == 2
    assert f"{REPOSITORY} on this machine has several" in err


def test_what_is_not_here_says_how_to_get_it(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "show", "o/none:Q4_K_M")
    assert code == 4
    assert "dynrun: o/none:Q4_K_M is not on this machine — get it: dynrun pull o/none:Q4_K_M" in err


def test_without_a_network_what_is_here_does(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    path = as_json(capsys, "pull", SCOUT)["files"][0]["path"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, out, err = run(capsys, "pull", SCOUT)
    assert (code, out.strip()) == (0, path)
    assert "is on this machine already" in err
    code, _, err = run(capsys, "pull", f"{REPOSITORY}:Q4_K_M")
    assert code == 3
    assert "HF_HUB_OFFLINE" in err


def test_a_file_of_the_users_is_there_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.gguf"
    path.write_bytes(b"GGUF")
    assert run(capsys, "pull", str(path))[:2] == (0, f"{path}\n")
    code, _, err = run(capsys, "rm", str(path), "--yes")
    assert code == 2
    assert "is a file of yours" in err
    assert path.exists()


def test_rm_says_what_it_frees_and_leaves_what_is_shared(
    hub: Hub, capsys: pytest.CaptureFixture[str], model: bytes
) -> None:
    from huggingface_hub import scan_cache_dir

    hub.models[REPOSITORY]["Tiny-Q8_0.gguf"] = model
    shared = Path(as_json(capsys, "pull", f"{REPOSITORY}:Q8_0")["files"][0]["path"])
    as_json(capsys, "pull", f"{REPOSITORY}:Q4_K_M")
    as_json(capsys, "pull", SCOUT)
    planned = as_json(capsys, "rm", SCOUT, "--dry-run")
    assert planned == {"names": ["UD-IQ2_XXS/Tiny-UD-IQ2_XXS.gguf"], "freed_bytes": 0, "removed": False}
    code, out, _ = run(capsys, "rm", SCOUT, "--yes")
    assert (code, out) == (0, "freed 0.0 MB\n")
    assert shared.read_bytes() == model
    assert as_json(capsys, "rm", f"{REPOSITORY}:Q8_0", "--yes")["freed_bytes"] == len(model)
    assert not scan_cache_dir().warnings
    assert [row["quant"] for row in as_json(capsys, "ls")["models"]] == ["Q4_K_M"]
    as_json(capsys, "rm", REPOSITORY, "--all", "--yes")
    assert not as_json(capsys, "ls")["models"]
    assert run(capsys, "rm", SCOUT, "--yes")[0] == 4


def test_rm_asks_first(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(as_json(capsys, "pull", SCOUT)["files"][0]["path"])
    code, _, err = run(capsys, "rm", SCOUT)
    assert code == 2
    assert "say so with --yes" in err
    assert path.exists()


def test_rm_takes_a_made_file_with_its_scheme(private_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = private_cache / "models" / "made"
    made.mkdir(parents=True)
    write_tiny_llama(made / "demo-Q4_K_M.gguf", n_embd=64, n_ff=64, n_block=1)
    (made / "demo-Q4_K_M.scheme.toml").write_text("")
    size = sum(path.stat().st_size for path in made.iterdir())
    code, out, err = run(capsys, "rm", "demo:Q4_K_M", "--yes")
    assert (code, out) == (0, f"freed {size / 1e6:,.1f} MB\n")
    assert len(err.splitlines()) == 2
    assert size > 100_000
    assert not list(made.iterdir())


def test_an_interruption_says_how_to_go_on(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynrun.cli import transfer_bars

    def interrupted(self: object, now: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer_bars.Lines, "__call__", interrupted)
    hub.fault = lambda path, start, end: Fault("stall")
    code, _, err = run(capsys, "pull", SCOUT, "--mmproj")
    assert code == InterruptedPullError.exit_code == 130
    assert f"dynrun: interrupted; what came is kept — go on with: dynrun pull {SCOUT} --mmproj\n" in err


def test_the_environment_rules(hub: Hub, tmp_path: Path) -> None:
    ours = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_child",
        "HF_HUB_DISABLE_XET": "1",
    }
    ran = dynrun("pull", SCOUT, "--json", env=ours)
    assert ran.exit_code == 0
    assert ran.json["files"][0]["path"].startswith(str(tmp_path / "home" / "hub"))
    assert "Bearer hf_child" in hub.tokens
    assert "hf_child" not in ran.stdout + ran.stderr
    offline = dynrun("pull", f"{REPOSITORY}:Q4_K_M", env={**ours, "HF_HUB_OFFLINE": "1"})
    assert offline.exit_code == 3
    # A proxy is asked, not the server: this one is none.
    port = f"http://127.0.0.1:{os.getpid() % 1000 + 1}"
    hub.requests.clear()
    assert dynrun("pull", f"{REPOSITORY}:Q4_K_M", env={**ours, "http_proxy": port, "no_proxy": ""}).exit_code == 3
    assert not hub.requests


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_on_a_terminal_it_asks_and_draws_within_80_columns(hub: Hub, tmp_path: Path, model: bytes) -> None:
    import fcntl
    import pty
    import struct
    import termios

    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    argv = [*ARGV, "pull", REPOSITORY]
    with subprocess.Popen(argv, env=env, stdin=slave, stdout=subprocess.PIPE, stderr=slave) as process:
        os.close(slave)
        os.write(master, b"2\ny\n")
        assert process.stdout is not None
        # It waits for its terminal to be read.
        reader = threading.Thread(target=lambda: seen.append(_until_closed(master)))
        seen: list[str] = []
        reader.start()
        path = process.stdout.read().decode().strip()
    reader.join()
    os.close(master)
    assert process.returncode == 0
    assert Path(path).read_bytes() in (model, model + b"\0")
    (text,) = seen
    assert f"{REPOSITORY} has several; which one?" in text
    assert "mmproj-F16.gguf (0.0 MB) lets the model see images; download it too? [Y/n]" in text
    bars = [line for line in re.split(r"[\r\n]|\x1b\[1A|\x1b\[2K", re.sub(r"\x1b\[[\d;]*m", "", text)) if "%" in line]
    assert any(line.startswith("all ") and "100%" in line for line in bars), text
    assert max(len(line.rstrip()) for line in bars) <= 80
    assert len(list(Path(path).parent.parent.rglob("mmproj-F16.gguf"))) == 1


def _until_closed(terminal: int) -> str:
    found = b""
    # Linux says so by an error.
    with suppress(OSError):
        while chunk := os.read(terminal, 1 << 16):
            found += chunk
    return found.decode()
