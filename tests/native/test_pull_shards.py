"""Pull real shards of llama-gguf-split by the real command, which is killed and interrupted, and merge what came."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dynrun.errors import NotFoundError
from dynrun.gguf.shards import read_whole_header
from dynrun.llamacpp.tools import merge_shards, split_file
from dynrun.models import open_reference
from tests.commands import ARGV, dynrun
from tests.hub_server import Fault, Hub, serving
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
NAME = "o/Tiny-GGUF:F16"


@dataclass
class Scene:
    """A server with a model in three shards, and the environment of a command that finds it."""

    hub: Hub
    model: Path
    shards: list[Path]
    home: Path

    @property
    def env(self) -> dict[str, str]:
        ours = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1"}
        return {**os.environ, **ours, "HF_HUB_DISABLE_TELEMETRY": "1"}

    def start(self) -> subprocess.Popen[str]:
        argv = [*ARGV, "pull", NAME]
        return subprocess.Popen(argv, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def noted(self) -> int:
        """Bytes that notes name."""
        notes = [json.loads(path.read_text()) for path in self.home.rglob("*.note.dynrun.incomplete")]
        return sum(end - start for note in notes for start, end in note["done"])

    def blobs(self) -> int:
        return sum(p.stat().st_size for p in self.home.glob("hub/*/blobs/*") if not p.name.endswith(".incomplete"))


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    model = write_tiny_llama(tmp_path / "tiny.gguf", n_block=4, n_ff=1024)
    (tmp_path / "split").mkdir()
    shards = split_file(model, tmp_path / "split" / "Tiny-F16", max_size="4M")
    assert len(shards) == 3
    with serving(Hub(models={"o/Tiny-GGUF": {path.name: path.read_bytes() for path in shards}})) as hub:
        yield Scene(hub, model, shards, tmp_path / "home")


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_and_interrupted_pulls_end_with_the_model(scene: Scene, tmp_path: Path) -> None:
    hub, total = scene.hub, sum(path.stat().st_size for path in scene.shards)
    last = scene.shards[2].name
    # The last shard never comes to its end, so that every run below is there to be stopped.
    hub.fault = lambda path, start, end: Fault("stall", after=100_000) if path == last else None
    kept = 0
    for number, exit_code in ((signal.SIGKILL, -9), (signal.SIGKILL, -9), (signal.SIGINT, 130)):
        hub.served.clear()
        with scene.start() as process:
            # As long as a note takes that names what came, and no longer.
            wait_for(lambda: scene.noted() + scene.blobs() > kept + 50_000)  # noqa: B023
            process.send_signal(number)
            _, err = process.communicate()
        assert process.returncode == exit_code
        # What a note named is not asked for again.
        assert sum(served.sent for served in hub.served) <= total - kept
        kept = scene.noted() + scene.blobs()
    assert f"dynrun: interrupted; what came is kept — go on with: dynrun pull {NAME}" in err
    hub.fault = lambda path, start, end: None
    hub.served.clear()
    ran = dynrun("pull", NAME, "--json", env=scene.env)
    assert ran.exit_code == 0, ran.stderr
    assert sum(served.sent for served in hub.served) == total - kept
    assert ran.json["resumed_bytes"] > 0
    first = Path(ran.json["files"][0]["path"])
    merge_shards(first, tmp_path / "merged.gguf")
    assert read_whole_header(first).tensors.keys() == read_whole_header(scene.model).tensors.keys()
    assert (tmp_path / "merged.gguf").stat().st_size >= scene.model.stat().st_size - 4096
    assert not list(scene.home.rglob("*.incomplete"))


def test_another_program_of_the_hub_takes_what_was_pulled(scene: Scene) -> None:
    assert dynrun("pull", NAME, env=scene.env).exit_code == 0
    hf = Path(ARGV[0]).with_name("hf")

    def run_hf(*arguments: str) -> str:
        done = subprocess.run([hf, *arguments], env=scene.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "o/Tiny-GGUF" in run_hf("cache", "ls", "--format", "json")
    run_hf("cache", "verify", "o/Tiny-GGUF")
    scene.hub.served.clear()
    run_hf("download", "o/Tiny-GGUF", scene.shards[1].name)
    assert not scene.hub.served


def test_shards_are_a_reference_as_any_other(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    reference = open_reference(str(scene.shards[0]))
    assert reference.name == "Tiny-F16"
    assert reference.header.tensors.keys() == read_whole_header(scene.model).tensors.keys()
    assert "joining the 3 shards of Tiny-F16.gguf" in capsys.readouterr().err
    assert open_reference(str(scene.shards[0])).sha256 == reference.sha256
    assert not capsys.readouterr().err
    os.utime(scene.shards[1], ns=(1, 1))
    assert open_reference(str(scene.shards[0])).path != reference.path
    scene.shards[1].unlink()
    with pytest.raises(NotFoundError, match="one of the 3 shards of the model"):
        open_reference(str(scene.shards[0]))
