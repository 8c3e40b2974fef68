"""build.py itself: what it needs to start, its command line, its error line and exit codes."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dynrun.errors import DoesNotFitError, DynrunError, NetworkError
from dynrun.paths import repository_root

SCRIPT = repository_root() / "build.py"


@pytest.fixture
def script() -> ModuleType:
    """build.py as a module."""
    spec = importlib.util.spec_from_file_location("build_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False)


class TestStart:
    def test_imports_nothing_but_the_standard_library_and_dynrun(self) -> None:
        code = f"""
import sys, runpy
sys.path[:] = [{str(repository_root())!r}, *sys.path]
runpy.run_path({str(SCRIPT)!r}, run_name="imported")
names = {{name.partition(".")[0] for name in sys.modules}} - set(sys.stdlib_module_names)
print(sorted(names))
"""
        # -I and -S: neither the environment's packages nor the user's can be seen.
        done = run(code, "-I", "-S")
        assert done.stderr == ""
        assert done.stdout.strip() == "['__main__', 'dynrun']"

    def test_an_old_python_is_told_so_in_one_line(self) -> None:
        fake = "import sys, runpy; sys.version_info = (3, 9, 2, 'final', 0)\n"
        done = run(fake + f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')")
        assert done.returncode == 1
        assert done.stderr == "dynrun needs Python 3.11 or newer; this is 3.9. Run build.py with it.\n"

    def test_an_old_python_can_read_it_so_far(self) -> None:
        """A syntax error would come before the message."""
        tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 7))
        before = [type(node).__name__ for node in tree.body[:3]]
        assert before == ["Expr", "Import", "If"]
        assert ast.unparse(tree.body[1]) == "import sys"
        assert ast.unparse(tree.body[2]).startswith("if sys.version_info < (3, 11):")


class TestCommandLine:
    def test_help_names_every_option(self, script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            script.main(["--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert all(word in text for word in ("--backend", "--jobs", "--clean", "--verbose", "demo", "test"))

    @pytest.mark.parametrize(
        "argv", [["--backend", "abacus"], ["--jobs", "0"], ["--jobs", "-1"], ["--jobs", "all"], ["--fast"], ["run"]]
    )
    def test_a_wrong_option_is_exit_code_2(
        self, argv: list[str], script: ModuleType, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            script.main(argv)
        assert caught.value.code == 2
        assert "build.py: error: " in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("failure", "exit_code", "line"),
        [
            (DynrunError("no compiler", fix="install one"), 1, "build.py: no compiler — install one"),
            (NetworkError("no index"), 3, "build.py: no index"),
            (DoesNotFitError("the disk is full"), 5, "build.py: the disk is full"),
            (OSError(22, "Invalid argument", "x"), 1, "build.py: [Errno 22] Invalid argument: 'x'"),
            (KeyboardInterrupt(), 130, "build.py: interrupted; run it again and it goes on"),
        ],
    )
    def test_a_failure_is_one_line_and_its_exit_code(
        self,
        failure: BaseException,
        exit_code: int,
        line: str,
        script: ModuleType,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def fail(*_: object) -> None:
            raise failure

        monkeypatch.setattr(script, "set_up", fail)
        assert script.main([]) == exit_code
        assert capsys.readouterr().err == line + "\n"

    @pytest.mark.parametrize(("codes", "worst"), [([0, 0, 0, 0, 0], 0), ([0, 1, 0, 2, 0], 2), ([3, 0, 0, 0, 0], 3)])
    def test_every_check_is_run_and_a_failed_one_is_not_forgotten(
        self, codes: list[int], worst: int, script: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        left = list(codes)
        monkeypatch.setattr(script, "set_up", lambda *_: None)
        monkeypatch.setattr(script.environment, "exec_in", lambda *_: left.pop(0))
        assert script.main(["test"]) == worst
        assert left == []

    def test_the_import_layers_are_among_the_checks(self, script: ModuleType) -> None:
        """The check is a call, as import-linter has no module that runs: here it sees its own help."""
        (check,) = [check for check in script.CHECKS if "importlinter" in check[1]]
        done = subprocess.run([sys.executable, *check, "--help"], capture_output=True, text=True, check=False)
        assert "Usage: " in done.stdout


class TestInAClone:
    def test_no_compiler_is_one_line_before_anything_is_made(self, tmp_path: Path) -> None:
        clone = tmp_path / "clone"
        (clone / "vendor").mkdir(parents=True)
        shutil.copy(SCRIPT, clone)
        shutil.copy(repository_root() / "vendor" / "pin.toml", clone / "vendor")
        ignore = shutil.ignore_patterns("__pycache__", "data")
        shutil.copytree(repository_root() / "dynrun", clone / "dynrun", ignore=ignore)
        environment = {"PATH": "", "DYNRUN_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)}
        environment |= {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
        argv = [sys.executable, str(clone / "build.py"), "--backend", "cpu"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith("build.py: no C++ compiler was found — install")
        assert len(done.stderr.splitlines()) == 1
        assert not (clone / ".venv").exists()


class TestProgress:
    def test_without_a_terminal_a_step_is_one_line_and_its_counting_is_quiet(
        self, script: ModuleType, capsys: pytest.CaptureFixture[str]
    ) -> None:
        progress = script.Progress()
        for number in range(1, 51):
            progress(f"compiling llama.cpp: step {number} of 50", False)
        progress("ready", True)
        assert capsys.readouterr().out == "compiling llama.cpp: step 1 of 50\nready\n"
