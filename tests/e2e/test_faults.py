"""The machine's faults, command by command: no right to write, a clock that goes back, two at once."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import ARGV, dynrun
from tests.tiny import write_tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.native, pytest.mark.skipif(sys.platform == "win32", reason="needs mounts")]
SMALL = ("--tokens", "512", "--ctx", "128", "--probe-tokens", "64", "--eval-tokens", "512", "--candidates", "2")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf")


def _mount(*arguments: str | Path) -> None:
    if subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own in memory, with room for everything."""
    folder = tmp_path / "disk"
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", "size=256M", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def _remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", folder], check=True)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith((".part", ".tmp", ".partial"))]


def test_a_cache_that_cannot_be_written(tiny: Path, disk: Path, tmp_path: Path) -> None:
    cache = {"DYNRUN_CACHE": str(disk)}
    made = dynrun("make", tiny, "--quant", "Q4_K_M", *SMALL, "--out", tmp_path / "a.gguf", env=cache)
    assert made.exit_code == 0, made.stderr
    _remount(disk, "ro")
    commands: list[tuple[tuple[str | Path, ...], int]] = [
        (("ls",), 0),
        (("show", tiny), 0),
        (("scheme", "show", tmp_path / "a.gguf"), 0),
        (("plan", tiny), 0),
        (("make", tiny, "--quant", "Q5_K_M", *SMALL, "--out", tmp_path / "b.gguf"), 1),
        (("imatrix", tiny, *SMALL[:4], "--out", tmp_path / "imatrix.gguf"), 1),
        (("eval", "kld", tiny, tmp_path / "a.gguf", "--tokens", "256"), 1),
        (("run", tiny, "-p", "x", "-n", "2"), 1),
    ]
    for arguments, expected in commands:
        ran = dynrun(*arguments, env=cache)
        assert ran.exit_code == expected, (arguments, ran.stderr)
        assert "Traceback" not in ran.stderr, arguments
        if expected:
            assert "cannot write" in ran.error, arguments
            assert str(disk) in ran.error, arguments
    assert not (tmp_path / "b.gguf").exists()
    doctor = dynrun("doctor", env=cache)
    assert (doctor.exit_code, doctor.stderr) == (1, "")
    assert "Read-only file system" in doctor.stdout


def test_two_of_one_model_at_once_end_with_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "DYNRUN_CACHE": str(tmp_path / "cache"), "DYNRUN_THREADS": "1"}
    outs = [tmp_path / "first.gguf", tmp_path / "second.gguf"]
    running = [
        subprocess.Popen(
            [*ARGV, "make", str(tiny), "--quant", "Q4_K_M", *SMALL, "--out", str(out)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for out in outs
    ]
    for process in running:
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert _digest(outs[0]) == _digest(outs[1])
    assert _leftovers(tmp_path) == []


def test_files_from_the_future_and_the_past_are_as_good(tiny: Path, tmp_path: Path) -> None:
    """The clock goes back by years between two runs: all that was made lies in the future, and is found."""
    cache = tmp_path / "cache"
    environment = {"DYNRUN_CACHE": str(cache), "DYNRUN_THREADS": "1"}
    argv = ("make", tiny, "--quant", "Q4_K_M", *SMALL, "--json")
    first = dynrun(*argv, "--out", tmp_path / "a.gguf", env=environment)
    assert first.exit_code == 0, first.stderr
    for years in (20, -20):
        then = time.time() + years * 365 * 86400
        for path in (*cache.rglob("*"), tiny):
            os.utime(path, (then, then))
        again = dynrun(*argv, "--out", tmp_path / f"{years}.gguf", env=environment)
        assert again.exit_code == 0, again.stderr
        assert all(stage["cached"] for stage in again.json["stages"]), again.json["stages"]
        assert _digest(tmp_path / f"{years}.gguf") == _digest(tmp_path / "a.gguf")
