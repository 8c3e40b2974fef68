"""Compiling: with CMake projects of a few steps in the place of llama.cpp."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from dynrun.errors import DoesNotFitError, DynrunError
from dynrun.llamacpp import build
from dynrun.llamacpp.backends import Choice
from dynrun.llamacpp.build import (
    Installation,
    compile_llama_cpp,
    discard_builds,
    find_compiler,
    installation,
    record_installation,
)
from dynrun.llamacpp.source import Pin
from dynrun.paths import builds_dir

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the projects' steps are shell commands")

PIN = Pin("p", "1", "0" * 64, "0c1e570", "2.0")
CPU = Choice("cpu", "asked for")
TOOLS = Path(sys.prefix) / "bin"
STEPS = 6
# No compiler: each step notes that it ran. The last one makes the program.
SHELL_PROJECT = """
cmake_minimum_required(VERSION 3.20)
project(fake NONE)
file(MAKE_DIRECTORY ${{CMAKE_BINARY_DIR}}/bin)
set(before "")
foreach(step RANGE 1 {steps})
  add_custom_command(OUTPUT ${{CMAKE_BINARY_DIR}}/step${{step}} DEPENDS ${{before}} VERBATIM
    COMMAND sh -c "echo ${{step}} >> '{ran}'; {command}; touch '${{CMAKE_BINARY_DIR}}/step${{step}}'")
  set(before ${{CMAKE_BINARY_DIR}}/step${{step}})
endforeach()
add_custom_command(OUTPUT ${{CMAKE_BINARY_DIR}}/bin/tool DEPENDS ${{before}}
  COMMAND sh -c "touch '${{CMAKE_BINARY_DIR}}/bin/tool'" VERBATIM)
add_custom_target(tool DEPENDS ${{CMAKE_BINARY_DIR}}/bin/tool)
"""
CPP_PROJECT = """
cmake_minimum_required(VERSION 3.20)
project(fake CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_library(tiny tiny.cpp)
set_target_properties(tiny PROPERTIES VERSION 1.2 SOVERSION 1)
add_executable(tool tool.cpp)
target_link_libraries(tool tiny)
"""
# Another process that compiles: source folder, seconds are up to the project.
COMPILE = """
import sys
from pathlib import Path
from dynrun.llamacpp.backends import Choice
from dynrun.llamacpp.build import compile_llama_cpp
from dynrun.llamacpp.source import Pin
compile_llama_cpp(
    Pin("p", "1", "0" * 64, "0c1e570", "2.0"), Path(sys.argv[1]), Choice("cpu", "asked for"), tools=Path(sys.argv[2]),
    jobs=1, report=lambda text, lasting: print(text, flush=True), programs=("tool",), libraries=())
"""


@dataclass
class Project:
    """A source folder, and how often its steps ran."""

    source: Path
    ran: Path
    said: list[str] = field(default_factory=list)

    def compile(self, pin: Pin = PIN, choice: Choice = CPU, libraries: tuple[str, ...] = ()) -> Installation:
        return compile_llama_cpp(
            pin,
            self.source,
            choice,
            tools=TOOLS,
            jobs=1,
            report=lambda text, lasting: self.said.append(text),
            programs=("tool",),
            libraries=libraries,
        )

    def start(self) -> subprocess.Popen[str]:
        """Compile in another process."""
        return subprocess.Popen(
            [sys.executable, "-c", COMPILE, self.source, TOOLS],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def steps(self) -> list[str]:
        return self.ran.read_text().split() if self.ran.exists() else []


def shell_project(folder: Path, command: str = "true", ran: Path | None = None, steps: int = STEPS) -> Project:
    """A project whose every step runs ``command``."""
    folder.mkdir()
    ran = ran or folder / "ran"
    (folder / "CMakeLists.txt").write_text(SHELL_PROJECT.format(ran=ran, command=command, steps=steps))
    return Project(folder, ran)


def gated_project(folder: Path, first: int) -> tuple[Project, Path]:
    """A project whose steps, from the ``first`` one on, wait until a file is there; and that file."""
    gate = folder / "gate"
    return shell_project(
        folder / "source", f"test ${{step}} -lt {first} || until test -e '{gate}'; do sleep 0.02; done"
    ), gate


def cpp_project(folder: Path, tool: str) -> Project:
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(CPP_PROJECT)
    (folder / "tiny.cpp").write_text("int tiny() { return 42; }\n")
    (folder / "tool.cpp").write_text(tool)
    return Project(folder, folder / "ran")


def failure_of(project: Project, libraries: tuple[str, ...] = ()) -> DynrunError:
    with pytest.raises(DynrunError) as caught:
        project.compile(libraries=libraries)
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


class TestCompile:
    def test_the_outputs_run_wherever_they_are_and_keep_their_links(self, tmp_path: Path) -> None:
        project = cpp_project(tmp_path / "source", "int tiny(); int main() { return tiny(); }\n")
        installed = project.compile(libraries=("tiny",))
        assert installed.bin.parent.parent == builds_dir()
        assert [path.name for path in installed.bin.parent.iterdir()].count("work") == 0
        assert "configuring llama.cpp" in project.said
        if sys.platform == "linux":
            assert (installed.bin / "libtiny.so").readlink() == Path("libtiny.so.1")
            assert (installed.bin / "libtiny.so.1").readlink() == Path("libtiny.so.1.2")
        shutil.move(installed.bin, tmp_path / "elsewhere")
        assert subprocess.run([tmp_path / "elsewhere" / "tool"], check=False).returncode == 42

    def test_progress_says_step_of_steps_time_and_log(self, tmp_path: Path) -> None:
        project = shell_project(tmp_path / "source")
        project.compile()
        steps = [line for line in project.said if line.startswith("compiling llama.cpp: step ")]
        assert steps[-1].startswith(f"compiling llama.cpp: step {STEPS + 1} of {STEPS + 1}, 0:0")
        assert Path(steps[-1].rpartition(", log ")[2]).is_file()

    def test_another_clone_compiles_nothing(self, tmp_path: Path) -> None:
        first = shell_project(tmp_path / "first")
        installed = first.compile()
        other = shell_project(tmp_path / "other")
        assert other.compile() == installed
        assert other.steps() == []
        assert other.said == [f"llama.cpp (cpu): compiled already, {installed.bin.parent}"]

    def test_a_build_that_lost_a_program_is_made_again(self, tmp_path: Path) -> None:
        project = shell_project(tmp_path / "source")
        installed = project.compile()
        (installed.bin / "tool").unlink()
        assert (project.compile().bin / "tool").is_file()

    def test_discarded_builds_are_gone(self, tmp_path: Path) -> None:
        project = shell_project(tmp_path / "source")
        installed = project.compile()
        discard_builds()
        assert not installed.bin.parent.exists()

    def test_amx_is_left_out_where_the_cpu_has_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for features, left_out in ((["avx2", "amx_tile", "amx_int8"], True), (["avx2"], False), ([], False)):
            monkeypatch.setattr(build, "cpu_flags", lambda features=features: features)
            flags = build.cmake_flags(Choice("cpu", "", ""), PIN)
            found = [flag for flag in flags if "-mno-amx-int8" in flag]
            assert len(found) == 2 * left_out, flags

    def test_the_fingerprint_follows_flags_compiler_cpu_and_source(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        project = shell_project(tmp_path / "source", steps=1)
        prints = [project.compile().fingerprint]
        assert project.compile().fingerprint == prints[0]
        prints.append(project.compile(choice=Choice("cuda", "", "89")).fingerprint)
        prints.append(project.compile(choice=Choice("cuda", "", "90")).fingerprint)
        prints.append(project.compile(replace(PIN, sha256="1" * 64)).fingerprint)
        with monkeypatch.context() as patch:
            patch.setattr(build, "cpu_features", lambda: "another CPU")
            prints.append(project.compile().fingerprint)
        compiler = tmp_path / "c++-99"
        compiler.write_text("#!/bin/sh\necho 'c++ 99.0'\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        prints.append(project.compile().fingerprint)
        assert len(set(prints)) == 6

    def test_stray_settings_of_llama_cpp_do_not_reach_the_build(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GGML_STRAY", "1")
        project = shell_project(tmp_path / "source", 'test -z \\"$GGML_STRAY\\"', steps=1)
        assert (project.compile().bin / "tool").is_file()


class TestFailures:
    @pytest.mark.parametrize(
        ("platform", "fix"),
        [("linux", "apt install g++"), ("darwin", "xcode-select --install"), ("win32", "Visual Studio Build Tools")],
    )
    def test_no_compiler_is_one_line_with_the_fix_for_the_platform(
        self, platform: str, fix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(sys, "platform", platform)
        with pytest.raises(DynrunError, match=r"no C\+\+ compiler was found") as caught:
            find_compiler()
        assert fix in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert caught.value.exit_code == 1

    def test_a_disk_that_is_too_small_is_told_before_anything_is_done(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        project = shell_project(tmp_path / "source")
        usage = shutil.disk_usage(tmp_path)._replace(free=1_200_000_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        error = failure_of(project)
        assert isinstance(error, DoesNotFitError)
        assert error.exit_code == 5
        assert "the build needs 2.5 GB" in str(error)
        assert "1.2 GB are free" in str(error)
        assert project.steps() == []

    def test_a_failed_compile_tells_the_compilers_reason_and_the_log(self, tmp_path: Path) -> None:
        error = failure_of(cpp_project(tmp_path / "source", "nonsense main() { return 0; }\n"), libraries=("tiny",))
        assert "compiling llama.cpp failed: " in str(error)
        assert "tool.cpp:1:1: error: " in str(error)
        assert "nonsense" in str(error)
        assert error.log is not None
        assert "nonsense" in error.log.read_text()
        assert str(error.log) in str(error)
        assert error.exit_code == 1

    def test_a_failed_configuration_tells_cmakes_reason(self, tmp_path: Path) -> None:
        project = shell_project(tmp_path / "source")
        (project.source / "CMakeLists.txt").write_text(
            'cmake_minimum_required(VERSION 3.20)\nproject(error NONE)\nmessage(FATAL_ERROR "needs a newer thing")\n'
        )
        assert "configuring llama.cpp failed: needs a newer thing — " in str(failure_of(project))

    @pytest.mark.parametrize(
        ("words", "exit_code"),
        [
            ("c++: fatal error: Killed signal terminated program cc1plus", 1),
            ("nvcc fatal : Unsupported gpu architecture", 1),
            ("collect2: error: ld returned 1 exit status", 1),
            ("cannot write x.o: No space left on device", 5),
        ],
    )
    def test_the_reason_is_found_among_harmless_words(self, words: str, exit_code: int, tmp_path: Path) -> None:
        said = tmp_path / "said"
        said.write_text(f"c++ -Wno-error=vla -o error.cpp.o\n{words}\n")
        error = failure_of(shell_project(tmp_path / "source", f"cat '{said}'; exit 1", steps=1))
        assert error.exit_code == exit_code
        assert (words if exit_code == 1 else "the disk became full while compiling") in str(error)


class TestInterruptions:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
    def test_an_interrupted_compile_goes_on(self, number: int, tmp_path: Path) -> None:
        project, gate = gated_project(tmp_path, first=4)
        with project.start() as other:
            while len(project.steps()) < 4:
                assert other.poll() is None
                time.sleep(0.01)
            other.send_signal(number)
        assert other.returncode != 0
        gate.touch()
        project.compile()
        # Only the one that was running ran twice.
        assert sorted(project.steps()) == sorted(["4", *(str(step) for step in range(1, STEPS + 1))])

    def test_two_at_once_compile_once(self, tmp_path: Path) -> None:
        project, gate = gated_project(tmp_path, first=1)
        with project.start() as one:
            while not project.steps():
                assert one.poll() is None
                time.sleep(0.01)
            with project.start() as two:
                assert two.stdout is not None
                assert "another build of the same llama.cpp is running; waiting for it" in two.stdout.readline()
                gate.touch()
                assert "compiled already" in two.communicate()[0]
            assert "waiting for it" not in one.communicate()[0]
        assert one.returncode == two.returncode == 0
        assert sorted(project.steps()) == [str(step) for step in range(1, STEPS + 1)]

    def test_an_unfinished_build_of_another_clone_is_cleared_with_a_reason(self, tmp_path: Path) -> None:
        failure_of(shell_project(tmp_path / "first", "exit 1"))
        other = shell_project(tmp_path / "other")
        assert (other.compile().bin / "tool").is_file()
        assert other.said[0] == "an unfinished build of another clone is in the way: starting anew"
        assert len(other.steps()) == STEPS

    def test_interrupted_before_it_was_declared_whole_it_is_not_compiled_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        project = shell_project(tmp_path / "source")

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(build, "write_json", interrupt)
            with pytest.raises(KeyboardInterrupt):
                project.compile()
        assert (project.compile().bin / "tool").is_file()
        assert len(project.steps()) == STEPS


class TestInstallation:
    @pytest.fixture(autouse=True)
    def prefix(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """An environment of the test's own."""
        installation.cache_clear()
        monkeypatch.setattr(sys, "prefix", str(tmp_path))
        yield tmp_path
        installation.cache_clear()

    def test_is_what_was_recorded(self, prefix: Path) -> None:
        (prefix / "bin").mkdir()
        installed = Installation(prefix / "bin", "f", "cpu", "0c1e570")
        record_installation(prefix, installed)
        assert installation() == installed

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"bin": 1}'])
    def test_a_damaged_record_is_one_line(self, text: str, prefix: Path) -> None:
        (prefix / build.RECORD).write_text(text)
        with pytest.raises(DynrunError, match=r"has not been built .* — run python3 build\.py"):
            installation()

    def test_no_record_is_one_line(self) -> None:
        with pytest.raises(DynrunError, match=r"has not been built .* — run python3 build\.py"):
            installation()

    def test_a_build_that_is_gone_is_one_line(self, prefix: Path) -> None:
        record_installation(prefix, Installation(prefix / "gone", "f", "cpu", "0c1e570"))
        with pytest.raises(DynrunError, match=r"is gone from .*gone — run python3 build\.py"):
            installation()

    def test_a_program_that_is_missing_is_one_line(self, prefix: Path) -> None:
        with pytest.raises(DynrunError, match=r"llama-cli is missing — run python3 build\.py"):
            Installation(prefix, "f", "cpu", "0c1e570").program("llama-cli")
