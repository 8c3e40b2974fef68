"""Files are whole or absent, locks die with their holder, keys are stable."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynrun.artifacts import (
    atomic_path,
    discard,
    file_lock,
    key_of,
    sha256_bytes,
    sha256_file,
    stage_folder,
    write_json,
    write_text,
)
from dynrun.errors import DoesNotFitError, DynrunError


def write_half(target: Path, failure: BaseException) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        raise failure


class TestAtomicPath:
    def test_the_file_is_there_only_after_the_block(self, tmp_path: Path) -> None:
        target = tmp_path / "new" / "file"
        with atomic_path(target) as temporary:
            temporary.write_bytes(b"whole")
            assert not target.exists()
        assert target.read_bytes() == b"whole"
        assert [p.name for p in target.parent.iterdir()] == ["file"]

    def test_a_failure_leaves_nothing_and_keeps_the_old_file(self, tmp_path: Path) -> None:
        target = tmp_path / "file"
        target.write_text("old")
        with pytest.raises(ValueError, match="half way"):
            write_half(target, ValueError("half way"))
        assert target.read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["file"]

    def test_ctrl_c_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            write_half(tmp_path / "file", KeyboardInterrupt())
        assert list(tmp_path.iterdir()) == []

    def test_the_file_is_as_readable_as_any_other(self, tmp_path: Path) -> None:
        write_text(tmp_path / "atomic", "x")
        (tmp_path / "plain").write_text("x")
        assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
    def test_a_full_disk_is_one_line_with_exit_code_5_and_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(DoesNotFitError) as caught, atomic_path(tmp_path / "model.gguf"):
            Path("/dev/full").write_bytes(b"x" * 100_000)
        assert caught.value.exit_code == 5
        assert str(caught.value).startswith(
            f"the disk is full while writing {tmp_path / 'model.gguf'} — free some space"
        )
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk_while_syncing_is_told_too(
        self, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(DoesNotFitError):
            write_json(tmp_path / "file", {})
        assert list(tmp_path.iterdir()) == []

    def test_a_refused_write_names_the_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(DynrunError, match=f"cannot write {tmp_path / 'file'}: Permission denied"):
            write_text(tmp_path / "file", "x")


class TestFileLock:
    HOLD = "import sys, time; from pathlib import Path; from dynrun.artifacts import file_lock\n"
    HOLD += "with file_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(float(sys.argv[2]))"

    def test_a_second_process_waits_and_says_so(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with subprocess.Popen(
            [sys.executable, "-c", self.HOLD, tmp_path / "lock", "0.7"], stdout=subprocess.PIPE
        ) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            started = time.monotonic()
            with file_lock(tmp_path / "lock", waiting="waiting for the other"):
                assert time.monotonic() - started > 0.3
        assert capsys.readouterr().err == "waiting for the other\n"

    def test_is_free_at_once_when_its_holder_is_killed(self, tmp_path: Path) -> None:
        with subprocess.Popen(
            [sys.executable, "-c", self.HOLD, tmp_path / "lock", "300"], stdout=subprocess.PIPE
        ) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            holder.kill()
            holder.wait()
            started = time.monotonic()
            with file_lock(tmp_path / "lock"):
                assert time.monotonic() - started < 2

    def test_is_not_handed_on_to_programs_that_the_holder_starts(self, tmp_path: Path) -> None:
        with file_lock(tmp_path / "lock"):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        started = time.monotonic()
        with file_lock(tmp_path / "lock"):
            assert time.monotonic() - started < 2
        child.kill()
        child.wait()

    def test_is_free_after_an_exception(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="inside"), file_lock(tmp_path / "lock"):
            raise ValueError("inside")
        with file_lock(tmp_path / "lock"):
            assert (tmp_path / "lock").is_file()

    @pytest.mark.skipif(sys.platform == "win32", reason="fcntl")
    def test_a_file_system_without_locks_is_told_and_not_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import fcntl

        def no_locks(*_: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", no_locks)
        with pytest.raises(DynrunError, match=f"cannot lock {tmp_path / 'lock'}"), file_lock(tmp_path / "lock"):
            pass


class TestKeyOf:
    def test_is_the_same_on_every_machine(self) -> None:
        assert key_of({"model": "abc", "types": ["Q4_K", "Q6_K"], "tokens": 4096}) == "57c747729559b5bb0ba12b43"

    def test_does_not_depend_on_the_order_of_keys(self) -> None:
        assert key_of({"a": 1, "b": {"c": 2, "d": 3}}) == key_of({"b": {"d": 3, "c": 2}, "a": 1})

    def test_a_tuple_is_a_list(self) -> None:
        assert key_of({"a": (1, 2)}) == key_of({"a": [1, 2]})

    @pytest.mark.parametrize("other", [{"a": 2}, {"a": "1"}, {"b": 1}, {"a": 1, "b": None}, {"a": 1.5}])
    def test_changes_with_every_input(self, other: dict[str, object]) -> None:
        assert key_of({"a": 1}) != key_of(other)


class TestSha256File:
    def test_is_that_of_the_bytes_and_follows_a_change(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        for data in (b"one", b"two"):
            file.write_bytes(data)
            assert sha256_file(file) == sha256_bytes(data)
            assert sha256_file(file) == sha256_bytes(data)

    @pytest.mark.parametrize("years", [20, -20])
    def test_follows_a_change_whose_time_lies_anywhere(self, years: int, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_bytes(b"one")
        assert sha256_file(file) == sha256_bytes(b"one")
        file.write_bytes(b"two")
        then = time.time() + years * 365 * 86400
        os.utime(file, (then, then))
        assert sha256_file(file) == sha256_bytes(b"two")

    def test_works_where_nothing_can_be_remembered(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "no-folder").write_text("in the way")
        monkeypatch.setenv("DYNRUN_CACHE", str(tmp_path / "no-folder"))
        (tmp_path / "file").write_bytes(b"data")
        assert sha256_file(tmp_path / "file") == sha256_bytes(b"data")


class TestStageFolder:
    def test_what_a_killed_run_left_is_gone_once_it_is_locked_again(self) -> None:
        folder = stage_folder("reference", {"tokens": 1})
        with folder.locked():
            (folder / ".00001.npy.abc.part").write_text("torn")
            (folder / "00000.npy").write_text("whole")
        with folder.locked():
            assert [path.name for path in folder.path.iterdir()] == ["00000.npy"]

    def test_is_complete_only_after_its_commit(self) -> None:
        folder = stage_folder("imatrix", {"tokens": 1})
        with folder.locked():
            (folder / "part").write_text("unfinished")
            assert not folder.complete
            folder.commit({"path": "part"}, elapsed_s=1.0)
        again = stage_folder("imatrix", {"tokens": 1})
        assert again.complete
        assert again.manifest()["result"] == {"path": "part"}
        assert not stage_folder("imatrix", {"tokens": 2}).complete


def test_discard_removes_the_marker_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal that is killed half way must not leave a folder that passes for whole."""
    folder = tmp_path / "build"
    folder.mkdir()
    (folder / "whole").touch()
    (folder / "library").touch()

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            discard(folder, "whole")
    assert [p.name for p in folder.iterdir()] == ["library"]
    discard(folder, "whole")
    discard(folder, "whole")
    assert not folder.exists()
