"""A disk that fills up at every stage: one line, exit code 5, nothing half-written; with room again the same bytes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynrun.hub.files import RemoteFile
from dynrun.hub.part import Part
from tests.commands import Ran, dynrun
from tests.disturbed import disturbed, fill
from tests.hub_server import Fault, Hub, serving
from tests.tiny import write_tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.native, pytest.mark.skipif(sys.platform == "win32", reason="needs mounts")]
SMALL = ("--types", "Q2_K,Q3_K,Q4_K,Q6_K", "--tokens", "512", "--ctx", "128", "--probe-tokens", "64")
SMALL += ("--eval-tokens", "512", "--candidates", "1")
# In the order in which `make` says them.
STAGES = ("text", "covariance", "imatrix", "sensitivity", "search", "quantize", "stock preset", "evaluation", "report")
_LEFTOVERS = (".part", ".tmp", ".partial")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf", n_block=1)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=128M", "tmpfs", folder]
    if subprocess.run(argv, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def make_room(disk: Path) -> None:
    (disk / "ballast").unlink()


def filled(disk: Path, when: str, *arguments: str | Path) -> Ran:
    """Run a command on ``disk``, which fills up as soon as it says a line, or makes a file, that ``when`` matches."""
    ran = dynrun(*arguments, env=on(disk), program=disturbed(f"fill:{disk}", when))
    assert (disk / "ballast").exists(), ran.stderr
    return ran


def on(disk: Path) -> dict[str, str]:
    return {"DYNRUN_CACHE": str(disk / "cache"), "DYNRUN_THREADS": "1"}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith(_LEFTOVERS)]


def results(folder: Path) -> dict[str, str]:
    """The files of `make` and of its report, by their hashes."""
    found = [path for path in (*folder.glob("made.*"), *folder.glob("made.report/*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def check_full(ran: Ran, disk: Path, wanted: dict[str, str]) -> None:
    """One line that says so, and nothing that is not whole."""
    assert ran.exit_code == 5, ran.stderr
    assert "full" in ran.error or "free" in ran.error
    assert leftovers(disk) == []
    assert results(disk).items() <= wanted.items()


def test_at_every_stage_of_make(tiny: Path, disk: Path, tmp_path: Path) -> None:
    argv = ("make", tiny, "--quant", "Q3_K_M", *SMALL, "--out")
    undisturbed = dynrun(*argv, tmp_path / "made.gguf", env=on(tmp_path))
    assert undisturbed.exit_code == 0, undisturbed.stderr
    wanted = results(tmp_path)
    for stage in STAGES:
        ran = filled(disk, f"^{stage}: ", *argv, disk / "made.gguf")
        check_full(ran, disk, wanted)
        make_room(disk)
    again = dynrun(*argv, disk / "made.gguf", env=on(disk))
    assert again.exit_code == 0, again.stderr
    assert results(disk) == wanted


def test_in_an_evaluation(tiny: Path, disk: Path, tmp_path: Path) -> None:
    argv = ("eval", "kld", tiny, tiny, "--tokens", "4096", "--ctx", "128", "--json")
    undisturbed = dynrun(*argv, env=on(tmp_path)).stdout
    for written in (r"/stages/reference/.*\.npy$", r"/stages/kld/.*\.npz$"):
        ran = filled(disk, written, *argv)
        check_full(ran, disk, {})
        make_room(disk)
    assert dynrun(*argv, env=on(disk)).stdout == undisturbed


def test_what_a_pull_has_is_noted_on_a_full_disk(disk: Path) -> None:
    file = RemoteFile("o/m", "c" * 40, "m-Q4_K_M.gguf", 24 << 20, "e" * 64, "e" * 64)
    part = Part(file, disk / "blob")
    part.prepare()
    fill(disk)
    for end in (10, 1 << 20):
        part.add(0, end)
        part.save()
    with part.path.open("r+b") as stream:
        stream.truncate(1 << 20)
    assert Part(file, disk / "blob").resumed_bytes == 1 << 20
    assert {path.name for path in disk.iterdir()} == {"ballast", part.path.name, part.note.name}


def test_in_a_pull(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = os.urandom(24 << 20)
    with serving(Hub(models={"o/m": {"m-Q4_K_M.gguf": model}})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(disk / "hub"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        fill(disk)
        check_full(dynrun("pull", "o/m:Q4_K_M", env=on(disk)), disk, {})
        make_room(disk)

        def half(path: str, start: int, end: int) -> Fault | None:
            if not start:
                return Fault("reset", after=len(model) // 2)
            fill(disk)
            return None

        hub.fault = half
        check_full(dynrun("pull", "o/m:Q4_K_M", env=on(disk)), disk, {})
        assert not [path for path in disk.rglob("*.gguf") if path.exists()]
        make_room(disk)
        hub.fault = lambda path, start, end: None
        again = dynrun("pull", "o/m:Q4_K_M", "--json", env=on(disk))
        assert again.exit_code == 0, again.stderr
        assert Path(again.json["files"][0]["path"]).read_bytes() == model
        assert again.json["resumed_bytes"] > 0
