"""Setting up the clone's environment: what is done again, what is not, and what is said when it fails.

Stubs stand for Python, so that nothing is installed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dynrun.errors import DynrunError, NetworkError
from dynrun.llamacpp import environment
from dynrun.llamacpp.backends import Choice
from dynrun.llamacpp.build import RECORD, Installation
from dynrun.llamacpp.environment import Venv, exec_in
from dynrun.llamacpp.source import Pin

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stub is a script")

PIN = Pin("p", "1", "0" * 64, "0c1e570", "2.13.0")
CPU, CUDA = Choice("cpu", ""), Choice("cuda", "", "90")
# Notes its arguments, then does what `answers.json` says for the first key that is among them.
STUB = """#!{python}
import json, sys
from pathlib import Path
here = Path(__file__).parent
with (here / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
for key, (code, out, err) in json.loads((here / "answers.json").read_text()).items():
    if any(key in argument for argument in sys.argv[1:]):
        print(out)
        print(err, file=sys.stderr)
        sys.exit(code)
"""


@dataclass
class Clone:
    """A clone in a folder of the test's own, with a stub for its Python."""

    root: Path
    venv: Venv
    said: list[str] = field(default_factory=list)

    def report(self, text: str, lasting: bool) -> None:
        self.said.append(text)

    def answers(self, answers: dict[str, tuple[int, str, str]]) -> None:
        (self.venv.bin / "answers.json").write_text(json.dumps(answers))

    def calls(self) -> list[list[str]]:
        calls = self.venv.bin / "calls"
        return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clone:
    root = tmp_path / "clone"
    venv = Venv(root / ".venv")
    venv.bin.mkdir(parents=True)
    venv.python.write_text(STUB.format(python=sys.executable))
    venv.python.chmod(0o755)
    monkeypatch.setattr(environment, "repository_root", lambda: root)
    (root / "requirements.lock").write_text("a==1 --hash=sha256:00\n")
    (root / "pyproject.toml").write_text("[project]\n")
    made = Clone(root, venv)
    made.answers({})
    return made


def torch_report(*sizes: int, names: tuple[str, ...] = ("torch", "filelock"), folder: Path) -> str:
    """What pip's --report says of packages of these sizes."""
    packages = []
    for name, size in zip(names, sizes, strict=True):
        (folder / name).write_bytes(bytes(size))
        packages.append({"metadata": {"name": name}, "download_info": {"url": (folder / name).as_uri()}})
    return json.dumps({"version": "1", "install": packages})


class TestLocked:
    def test_is_installed_with_hashes_and_once(self, clone: Clone) -> None:
        for _ in range(2):
            environment.install_locked(clone.venv, clone.report)
        assert len(clone.calls()) == 1
        assert "--require-hashes" in clone.calls()[0]
        assert str(clone.root / "requirements.lock") in clone.calls()[0]
        assert clone.said == ["installing the locked packages"]

    def test_is_installed_again_when_the_lock_changes(self, clone: Clone) -> None:
        environment.install_locked(clone.venv, clone.report)
        (clone.root / "requirements.lock").write_text("a==2 --hash=sha256:11\n")
        environment.install_locked(clone.venv, clone.report)
        assert len(clone.calls()) == 2

    def test_a_failure_is_one_line_and_the_step_is_done_again(self, clone: Clone) -> None:
        clone.answers({"install": (1, "", "ERROR: Invalid requirement: 'a=='")})
        with pytest.raises(DynrunError, match="pip could not get the locked packages: Invalid requirement") as caught:
            environment.install_locked(clone.venv, clone.report)
        assert len(str(caught.value).splitlines()) == 1
        assert caught.value.log is not None
        clone.answers({})
        environment.install_locked(clone.venv, clone.report)
        assert len(clone.calls()) == 2

    def test_damaged_stamps_mean_that_nothing_is_done(self, clone: Clone) -> None:
        clone.venv.stamp("locked", "key")
        assert clone.venv.done("locked", "key")
        (clone.venv.path / "dynrun-setup.json").write_text("{")
        assert not clone.venv.done("locked", "key")


class TestTorch:
    def test_a_cpu_build_is_preferred_without_cuda_and_its_size_is_said_first(
        self, clone: Clone, tmp_path: Path
    ) -> None:
        clone.answers({"--dry-run": (0, torch_report(3_000_000, 1_000_000, folder=tmp_path), "")})
        environment.install_torch(clone.venv, PIN, CPU, clone.report)
        assert [call[-1] for call in clone.calls()] == ["torch==2.13.0+cpu", "torch==2.13.0+cpu"]
        assert clone.said == ["installing torch 2.13.0+cpu and 1 more packages (CPU build, 4 MB)"]

    def test_the_plain_build_is_taken_where_there_is_no_cpu_build(self, clone: Clone, tmp_path: Path) -> None:
        names = ("torch", "nvidia-cublas")
        report = torch_report(3_000_000, 9_000_000, names=names, folder=tmp_path)
        clone.answers({"+cpu": (1, "", "ERROR: No matching distribution"), "--dry-run": (0, report, "")})
        environment.install_torch(clone.venv, PIN, CPU, clone.report)
        assert clone.calls()[-1][-1] == "torch==2.13.0"
        assert clone.said == ["installing torch 2.13.0 and 1 more packages (CUDA build, 12 MB)"]

    def test_with_a_cuda_device_the_cpu_build_is_not_asked_for(self, clone: Clone, tmp_path: Path) -> None:
        clone.answers({"--dry-run": (0, torch_report(1_000_000, 0, folder=tmp_path), "")})
        environment.install_torch(clone.venv, PIN, CUDA, clone.report)
        assert {call[-1] for call in clone.calls()} == {"torch==2.13.0"}

    def test_is_installed_once_for_each_kind_of_machine(self, clone: Clone, tmp_path: Path) -> None:
        clone.answers({"--dry-run": (0, torch_report(1_000_000, 0, folder=tmp_path), "")})
        for choice in (CPU, CPU, CUDA):
            environment.install_torch(clone.venv, PIN, choice, clone.report)
        assert len(clone.said) == 2

    def test_no_network_is_one_line_with_exit_code_3(self, clone: Clone) -> None:
        clone.answers({"--dry-run": (1, "", "ERROR: Could not find torch==2.13.0 (from versions: none)")})
        with pytest.raises(NetworkError, match=r"torch 2\.13\.0") as caught:
            environment.install_torch(clone.venv, PIN, CPU, clone.report)
        assert len(str(caught.value).splitlines()) == 1


class TestBindings:
    def test_are_installed_once_from_the_archive_without_the_network(self, clone: Clone, tmp_path: Path) -> None:
        for _ in range(2):
            environment.install_bindings(clone.venv, PIN, tmp_path / "a.tar.gz", tmp_path / "source", clone.report)
        (call,) = clone.calls()
        assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(call)
        assert call[-2:] == [str(tmp_path / "a.tar.gz"), str(tmp_path / "source" / "gguf-py")]

    def test_dynrun_is_installed_editable_and_again_when_pyproject_changes(self, clone: Clone) -> None:
        for _ in range(2):
            environment.install_dynrun(clone.venv, clone.report)
        assert [call[-2:] for call in clone.calls()] == [["-e", str(clone.root)]]
        (clone.root / "pyproject.toml").write_text("[project]\nname = 'x'\n")
        environment.install_dynrun(clone.venv, clone.report)
        assert len(clone.calls()) == 2


class TestFinish:
    def test_records_the_build_and_checks_it_once(self, clone: Clone, tmp_path: Path) -> None:
        installed = Installation(tmp_path, "f", "cpu", "0c1e570")
        for _ in range(2):
            environment.finish(clone.venv, installed)
        assert len(clone.calls()) == 1
        assert json.loads((clone.venv.path / RECORD).read_text())["fingerprint"] == "f"

    def test_a_build_that_cannot_be_loaded_is_one_line(self, clone: Clone, tmp_path: Path) -> None:
        clone.answers({"-c": (1, "", "OSError: libllama.so: cannot open")})
        with pytest.raises(DynrunError, match="cannot open") as caught:
            environment.finish(clone.venv, Installation(tmp_path, "f", "cpu", "0c1e570"))
        assert len(str(caught.value).splitlines()) == 1


class TestMakeVenv:
    def use_python(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
        stub = tmp_path / "python"
        stub.write_text(f"#!/bin/sh\n{body}\n")
        stub.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(stub))

    def test_an_unfinished_one_is_replaced_and_a_finished_one_kept(
        self, clone: Clone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.use_python(monkeypatch, tmp_path, 'test "$1 $2" = "-m venv" && mkdir -p "$3/bin" && touch "$3/bin/python"')
        venv = environment.make_venv(clone.report)
        assert clone.said[0] == "the environment .venv is unfinished or of another Python: making it anew"
        assert [path.name for path in venv.bin.iterdir()] == ["python"]
        assert environment.make_venv(clone.report) == venv
        assert len(clone.said) == 2

    def test_one_of_another_python_is_replaced(
        self, clone: Clone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.use_python(monkeypatch, tmp_path, 'mkdir -p "$3/bin" && touch "$3/bin/python"')
        environment.make_venv(clone.report).stamp("locked", "key")
        monkeypatch.setattr(sys, "version_info", (3, 99, 0))
        assert not environment.make_venv(clone.report).done("locked", "key")

    def test_a_python_without_its_venv_module_is_one_line_with_the_fix(
        self, clone: Clone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.use_python(monkeypatch, tmp_path, "echo No module named venv >&2; exit 1")
        with pytest.raises(DynrunError, match="cannot make a virtual environment — install its venv module"):
            environment.make_venv(clone.report)
        assert not clone.venv.path.exists()


class TestExecIn:
    @pytest.mark.parametrize("code", [0, 3])
    def test_gives_the_exit_code(self, code: int, clone: Clone) -> None:
        clone.answers({"-m": (code, "", "")})
        assert exec_in(clone.venv, ("-m", "x")) == code

    def test_a_death_by_signal_is_a_shells_exit_code(self, clone: Clone) -> None:
        clone.venv.python.write_text("#!/bin/sh\nkill -9 $$\n")
        assert exec_in(clone.venv, ("-m", "x")) == 128 + signal.SIGKILL

    def test_on_ctrl_c_the_childs_answer_counts(self, clone: Clone) -> None:
        """The terminal sends Ctrl+C to both; the child takes its time to tidy up."""
        tidy = "def tidy(*_): time.sleep(0.6); print('tidied', flush=True); sys.exit(9)"
        child = (
            f"#!{sys.executable}\nimport signal, sys, time\n{tidy}\n"
            "signal.signal(signal.SIGINT, tidy)\nprint('ready', flush=True)\ntime.sleep(20)\n"
        )
        clone.venv.python.write_text(child)
        code = (
            "import sys; from pathlib import Path; from dynrun.llamacpp.environment import Venv, exec_in\n"
            f"sys.exit(exec_in(Venv(Path({str(clone.venv.path)!r})), ()))"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, process_group=0
        ) as parent:
            assert parent.stdout is not None
            assert parent.stdout.readline() == "ready\n"
            time.sleep(0.1)
            os.killpg(parent.pid, signal.SIGINT)
            assert parent.stdout.read() == "tidied\n"
        assert parent.returncode == 9
