"""Running programs: what comes back, what an error carries, and that nothing outlives the call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from dynrun.errors import DynrunError
from dynrun.llamacpp import process
from dynrun.llamacpp.process import ToolError, capture, live, new_log, scrubbed_environment, spawned, stream, terminate

# Starts a child of its own, says both process ids, then waits for ever.
FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(300)
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def wait_until_gone(pids: list[int], seconds: float = 10.0) -> list[int]:
    """Those of ``pids`` that are still running after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        left = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.05)


class TestCapture:
    def test_gives_stdout_whole_and_the_last_lines_of_stderr(self) -> None:
        code = "import sys; print('a'); print('b'); [print(i, file=sys.stderr) for i in range(100)]"
        done = capture(python(code))
        assert done.stdout == "a\nb\n"
        assert done.stderr_tail[-1] == "99\n"
        assert len(done.stderr_tail) == 40
        assert done.exit_code == 0
        assert done.argv == tuple(python(code))
        assert done.elapsed_s > 0

    def test_megabytes_on_both_outputs_do_not_block(self) -> None:
        line = "'x' * 99"
        code = f"import sys; [(print({line}), print({line}, file=sys.stderr)) for _ in range(20_000)]"
        assert len(capture(python(code)).stdout) == 2_000_000

    def test_bytes_that_are_no_utf8_are_replaced(self) -> None:
        assert capture(python(r"import sys; sys.stdout.buffer.write(b'\xff\n')")).stdout == "�\n"

    def test_standard_input_is_empty(self) -> None:
        assert capture(python("import sys; print(repr(sys.stdin.read()))")).stdout == "''\n"

    def test_a_failure_carries_argv_exit_code_stderr_and_log(self) -> None:
        log = new_log("tool")
        argv = python("import sys; print('working'); print('no such layer', file=sys.stderr); sys.exit(3)")
        with pytest.raises(ToolError, match="failed with exit code 3: no such layer") as caught:
            capture(argv, log=log)
        error = caught.value
        assert error.argv == tuple(argv)
        assert error.tool_exit_code == 3
        assert error.stderr_tail == ("no such layer\n",)
        assert error.log == log
        assert str(log) in str(error)
        assert len(str(error).splitlines()) == 1

    def test_the_log_holds_the_command_and_both_outputs(self) -> None:
        log = new_log("tool")
        capture(python("import sys; print('out'); print('err', file=sys.stderr)"), log=log)
        text = log.read_text()
        assert text.startswith(f"$ {sys.executable} -c ")
        assert {"out", "err"} <= set(text.splitlines())

    def test_a_death_by_signal_is_named(self) -> None:
        with pytest.raises(ToolError, match="signal SIGKILL") as caught:
            capture(python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
        assert caught.value.tool_exit_code == -signal.SIGKILL

    def test_without_check_a_failure_is_a_result(self) -> None:
        assert capture(python("raise SystemExit(7)"), check=False).exit_code == 7

    def test_a_program_that_is_not_there_is_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(DynrunError, match=r"cannot start .*nothing: No such file") as caught:
            capture([tmp_path / "nothing"])
        assert len(str(caught.value).splitlines()) == 1

    def test_what_the_program_leaves_running_is_ended_and_not_waited_for(self) -> None:
        code = (
            "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']);"
            "print(p.pid)"
        )
        started = time.monotonic()
        done = capture(python(code))
        assert time.monotonic() - started < 20
        assert wait_until_gone([int(done.stdout)]) == []


class TestStream:
    def test_lines_come_while_the_program_runs(self) -> None:
        """The program goes on only after its first line has been seen."""
        seen: list[str] = []

        def answer(line: str) -> None:
            seen.append(line)
            if line == "first\n":
                gate.touch()

        gate = new_log("gate")
        code = f"""
import pathlib, time
print("first", flush=True)
while not pathlib.Path({str(gate)!r}).exists(): time.sleep(0.01)
print("second")
"""
        assert stream(python(code), answer).stdout == "first\nsecond\n"
        assert seen == ["first\n", "second\n"]

    def test_progress_with_carriage_returns_comes_as_lines(self) -> None:
        seen: list[str] = []
        stream(python("print('1%', end='\\r'); print('2%', end='\\r')"), seen.append)
        assert seen == ["1%\n", "2%\n"]

    def test_an_exception_of_the_listener_ends_the_program_and_is_raised(self) -> None:
        def fail(line: str) -> None:
            raise ValueError(line)

        started = time.monotonic()
        with pytest.raises(ValueError, match="hello"):
            stream(python("import time; print('hello', flush=True); time.sleep(300)"), fail)
        assert time.monotonic() - started < 20

    def test_cancel_ends_the_whole_family(self) -> None:
        cancel, pids = threading.Event(), list[int]()

        def note(line: str) -> None:
            pids.extend(map(int, line.split()))
            cancel.set()

        with pytest.raises(ToolError, match="was cancelled"):
            stream(python(FAMILY), note, cancel=cancel)
        assert len(pids) == 2
        assert wait_until_gone(pids) == []

    def test_ctrl_c_ends_the_whole_family(self) -> None:
        pids: list[int] = []

        def note(line: str) -> None:
            pids.extend(map(int, line.split()))
            os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            stream(python(FAMILY), note)
        assert len(pids) == 2
        assert wait_until_gone(pids) == []


class TestSpawned:
    def test_an_exception_inside_ends_the_whole_family(self) -> None:
        pids: list[int] = []

        def fail_inside() -> None:
            with spawned(python(FAMILY), pipes=True) as child:
                assert child.stdout is not None
                assert child.stderr is not None
                with child.stdout, child.stderr:
                    pids.extend(map(int, child.stdout.readline().split()))
                raise RuntimeError("of the caller")

        with pytest.raises(RuntimeError, match="of the caller"):
            fail_inside()
        assert len(pids) == 2
        assert wait_until_gone(pids) == []

    def test_a_program_that_ignores_sigterm_is_ended_by_force(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(process, "_GRACE_S", 0.2)
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(300)"
        with spawned(python(code), pipes=True) as child:
            assert child.stdout is not None
            assert child.stderr is not None
            with child.stdout, child.stderr:
                child.stdout.readline()
                terminate(child)
            assert child.returncode == -signal.SIGKILL

    def test_outputs_go_to_the_file_that_is_given(self, tmp_path: Path) -> None:
        with (tmp_path / "log").open("wb") as log, spawned(python("print('served')"), stderr=log) as child:
            assert child.wait() == 0
        assert (tmp_path / "log").read_text() == "served\n"

    def test_a_program_outlives_the_thread_that_started_it(self) -> None:
        opened: list[tuple[ExitStack, subprocess.Popen[str]]] = []

        def start() -> None:
            stack = ExitStack()
            opened.append((stack, stack.enter_context(spawned(python("import time; time.sleep(300)"), pipes=True))))

        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        ((stack, child),) = opened
        assert child.stdout is not None
        assert child.stderr is not None
        with child.stdout, child.stderr:
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(0.3)
            stack.close()
        assert child.returncode is not None
        assert wait_until_gone([child.pid]) == []

    @pytest.mark.skipif(os.name != "posix", reason="needs a shell")
    def test_the_program_dies_when_dynrun_is_killed_whichever_thread_started_it(self) -> None:
        code = (
            "import sys, threading; from dynrun.llamacpp.process import stream\n"
            f"run = lambda: stream([sys.executable, '-c', {FAMILY!r}], lambda line: print(line, end='', flush=True))\n"
            "threading.Thread(target=run).start()"
        )
        with subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            pids = list(map(int, parent.stdout.readline().split()))
            parent.kill()
        assert len(pids) == 2
        assert wait_until_gone(pids) == [], "the watchdog ends the whole group"

    @pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux only")
    def test_the_program_dies_when_dynrun_is_killed(self) -> None:
        code = (
            "import sys; from dynrun.llamacpp.process import stream\n"
            f"stream([sys.executable, '-c', {FAMILY!r}], lambda line: print(line, end='', flush=True))"
        )
        with subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            leader, grandchild = map(int, parent.stdout.readline().split())
            parent.kill()
        try:
            assert wait_until_gone([leader]) == []
        finally:
            os.kill(grandchild, signal.SIGKILL)


class TestLive:
    def test_uses_the_terminal_as_it_is(self, capfd: pytest.CaptureFixture[str]) -> None:
        live(python("print('to the terminal')"))
        assert capfd.readouterr().out == "to the terminal\n"

    def test_a_failure_carries_argv_and_exit_code(self) -> None:
        with pytest.raises(ToolError, match="failed with exit code 5") as caught:
            live(python("raise SystemExit(5)"))
        assert caught.value.argv == tuple(python("raise SystemExit(5)"))
        assert caught.value.tool_exit_code == 5

    def test_is_given_its_environment_and_folder(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        live(python("import os; print(os.environ['A'], os.getcwd())"), env={**os.environ, "A": "b"}, cwd=tmp_path)
        assert capfd.readouterr().out == f"b {tmp_path}\n"


def test_scrubbed_environment_drops_stray_settings_and_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLAMA_ARG_CTX_SIZE", "GGML_VK_VISIBLE_DEVICES", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "stray")
    monkeypatch.setenv("KEPT", "yes")
    clean = scrubbed_environment({"LLAMA_API_KEY": "given"})
    assert "stray" not in clean.values()
    assert clean["KEPT"] == "yes"
    assert clean["LLAMA_API_KEY"] == "given"
