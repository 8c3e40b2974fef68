"""Fetching and unpacking the pinned source, against a package index on this machine and hostile archives."""

from __future__ import annotations

import functools
import gzip
import http.server
import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dynrun.artifacts import sha256_bytes
from dynrun.errors import DynrunError, NetworkError
from dynrun.llamacpp.process import Completed
from dynrun.llamacpp.source import (
    Pin,
    WrongHashError,
    discard_source,
    explain_pip_failure,
    fetch_archive,
    read_pin,
    unpack_source,
)
from dynrun.paths import downloads_dir, repository_root

NAME = "llama_cpp_python-0.3.36"
ARCHIVE = f"{NAME}.tar.gz"
# pip asks the package for its metadata; this backend, in the archive itself, answers without any other package.
BACKEND = f"""
from pathlib import Path
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = Path(folder) / "{NAME}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: 0.3.36\\n")
    return info.name
def build_wheel(*a, **k): raise SystemExit("nobody builds this")
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
FILES = {
    f"{NAME}/PKG-INFO": "Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 0.3.36\n",
    f"{NAME}/pyproject.toml": PYPROJECT,
    f"{NAME}/backend.py": BACKEND,
    f"{NAME}/vendor/llama.cpp/CMakeLists.txt": "project(fake)\n",
    f"{NAME}/vendor/llama.cpp/src/llama.cpp": "int llama;\n",
}
Edit = Callable[[tarfile.TarFile], None]


def add(tar: tarfile.TarFile, name: str, text: str = "evil\n", **attributes: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(text.encode()) if "type" not in attributes else 0
    for key, value in attributes.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(text.encode()))


def source_package(edit: Edit | None = None) -> bytes:
    """The bytes of a source package with a small llama.cpp; ``edit`` adds members to it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in FILES.items():
            add(tar, name, text)
        if edit is not None:
            edit(tar)
    return buffer.getvalue()


def pin_of(data: bytes) -> Pin:
    return Pin("llama-cpp-python", "0.3.36", sha256_bytes(data), "0c1e570", "2.0")


def one_line(error: DynrunError) -> str:
    assert len(str(error).splitlines()) == 1
    return str(error)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@dataclass(frozen=True)
class Index:
    """A package index on this machine; ``put`` has it serve other bytes, ``downloads`` what is kept afterwards."""

    folder: Path
    python: Path

    def put(self, data: bytes) -> None:
        (self.folder / ARCHIVE).write_bytes(data)

    def downloads(self) -> list[str]:
        return sorted(path.name for path in downloads_dir().iterdir() if path.suffix != ".lock")


@pytest.fixture
def use_index(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have pip know this index and nothing else of this machine's configuration."""

    def use(url: str) -> None:
        for name in [name for name in os.environ if name.startswith("PIP_") or name.lower().endswith("_proxy")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", url)
        monkeypatch.setenv("PIP_RETRIES", "0")
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")

    return use


@pytest.fixture
def index(tmp_path: Path, use_index: Callable[[str], None]) -> Iterator[Index]:
    root = tmp_path / "index"
    folder = root / "llama-cpp-python"
    folder.mkdir(parents=True)
    (folder / "index.html").write_text(f'<!DOCTYPE html><html><body><a href="{ARCHIVE}">{ARCHIVE}</a></body></html>')
    handler = functools.partial(QuietHandler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        use_index(f"http://127.0.0.1:{server.server_port}/")
        yield Index(folder, Path(sys.executable))
        server.shutdown()
        thread.join()


class TestFetch:
    def test_the_pinned_archive_is_fetched_and_unpacked_whole(self, index: Index, tmp_path: Path) -> None:
        data = source_package()
        index.put(data)
        archive = fetch_archive(pin_of(data), index.python)
        assert archive.read_bytes() == data
        assert index.downloads() == [ARCHIVE]
        target = unpack_source(pin_of(data), archive, tmp_path / "vendor" / "llama.cpp")
        assert (target / "CMakeLists.txt").read_text() == "project(fake)\n"
        assert (target / "src" / "llama.cpp").read_text() == "int llama;\n"
        assert [path.name for path in target.parent.iterdir()] == ["llama.cpp"]

    def test_a_verified_archive_is_not_fetched_again(self, index: Index) -> None:
        data = source_package()
        downloads_dir().mkdir(parents=True)
        (downloads_dir() / ARCHIVE).write_bytes(data)
        assert fetch_archive(pin_of(data), index.python).read_bytes() == data

    def test_another_file_than_the_pinned_one_is_one_line_and_not_kept(self, index: Index, tmp_path: Path) -> None:
        ran = tmp_path / "its-code-ran"
        index.put(source_package(lambda tar: add(tar, f"{NAME}/backend.py", f"open({str(ran)!r}, 'w')")))
        with pytest.raises(WrongHashError) as caught:
            fetch_archive(pin_of(source_package()), index.python)
        assert f"the download of {ARCHIVE} does not have the pinned sha256; it was removed" in one_line(caught.value)
        assert caught.value.exit_code == 1
        assert index.downloads() == []
        assert not ran.exists()

    def test_a_damaged_archive_and_a_killed_download_in_the_cache_are_removed(self, index: Index) -> None:
        data = source_package()
        index.put(data)
        left = downloads_dir() / f".{ARCHIVE}-killed"
        left.mkdir(parents=True)
        (left / ARCHIVE).write_bytes(data[:100])
        (downloads_dir() / ARCHIVE).write_bytes(data[:-100] + bytes(100))
        assert fetch_archive(pin_of(data), index.python).read_bytes() == data
        assert index.downloads() == [ARCHIVE]

    def test_no_network_is_one_line_with_exit_code_3(self, use_index: Callable[[str], None]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            use_index(f"http://127.0.0.1:{free.getsockname()[1]}/")
            with pytest.raises(NetworkError) as caught:
                fetch_archive(pin_of(b""), Path(sys.executable))
        assert ARCHIVE in one_line(caught.value)
        assert caught.value.exit_code == 3
        assert caught.value.log is not None
        assert caught.value.log.is_file()


class TestPipsWords:
    """What pip prints of a failure, and what it is taken for."""

    @pytest.mark.parametrize(
        ("words", "exit_code"),
        [
            ("WARNING: Retrying after connection broken by 'NewConnectionError('", 3),
            ("pip._vendor.urllib3.exceptions.ReadTimeoutError: Read timed out.", 3),
            ("ERROR: HTTP error 503 while getting https://host/x.tar.gz", 3),
            ("ERROR: Could not find a version that satisfies the requirement x==1 (from versions: none)", 3),
            ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", 1),
            ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", 5),
            ("ERROR: Could not find a version that satisfies the requirement x==1 (from versions: 0.9)", 1),
        ],
    )
    def test_have_the_exit_code_of_their_kind(self, words: str, exit_code: int) -> None:
        error = explain_pip_failure(Completed(("pip",), 1, "", (words + "\n",), None, 0.0), "x")
        assert error.exit_code == exit_code
        assert "x" in one_line(error)


def link(name: str, to: str, kind: bytes) -> Edit:
    return lambda tar: add(tar, name, type=kind, linkname=to)


HOSTILE: dict[str, Edit] = {
    "an absolute path": lambda tar: add(tar, "/tmp/evil"),
    "a path that climbs out": lambda tar: add(tar, f"{NAME}/../../evil"),
    "a path that climbs within": lambda tar: add(tar, f"{NAME}/vendor/../evil"),
    "a path with backslashes": lambda tar: add(tar, "..\\evil"),
    "a path with a drive": lambda tar: add(tar, "C:evil"),
    "a symbolic link out": link(f"{NAME}/out", "../..", tarfile.SYMTYPE),
    "an absolute symbolic link": link(f"{NAME}/out", "/etc", tarfile.SYMTYPE),
    "a hard link out": link(f"{NAME}/out", "../../etc/passwd", tarfile.LNKTYPE),
    "a device": link(f"{NAME}/null", "", tarfile.CHRTYPE),
    "a pipe": link(f"{NAME}/pipe", "", tarfile.FIFOTYPE),
}


def chained_links(tar: tarfile.TarFile) -> None:
    """Each link stays inside by its letters; followed one through the other they lead out."""
    add(tar, f"{NAME}/a/up", type=tarfile.SYMTYPE, linkname="..")
    add(tar, f"{NAME}/a/out", type=tarfile.SYMTYPE, linkname="up/..")
    add(tar, f"{NAME}/a/out/evil")


HOSTILE["links that lead out together"] = chained_links


class TestUnpack:
    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        """An empty folder in a folder, so that what climbs out is seen."""
        place = tmp_path / "outer" / "vendor"
        place.mkdir(parents=True)
        return place

    def archive(self, tmp_path: Path, data: bytes) -> Path:
        path = tmp_path / ARCHIVE
        path.write_bytes(data)
        return path

    @pytest.mark.parametrize("kind", HOSTILE)
    def test_a_hostile_member_is_refused_and_nothing_is_written(self, kind: str, tmp_path: Path, place: Path) -> None:
        data = source_package(HOSTILE[kind])
        with pytest.raises(DynrunError, match=r"unsafe member .*; nothing was unpacked") as caught:
            unpack_source(pin_of(data), self.archive(tmp_path, data), place / "llama.cpp")
        one_line(caught.value)
        assert sorted(tmp_path.rglob("*")) == sorted([tmp_path / ARCHIVE, place, place.parent])

    @pytest.mark.parametrize("cut", [0, 1, 9, 60, 0.3, 0.6, 0.9, -1, -9])
    def test_a_truncated_archive_is_one_line_and_nothing_is_written(
        self, cut: float, tmp_path: Path, place: Path
    ) -> None:
        data = source_package()
        end = cut if isinstance(cut, int) else int(len(data) * cut)
        with pytest.raises(DynrunError, match="is damaged") as caught:
            unpack_source(pin_of(data), self.archive(tmp_path, data[:end]), place / "llama.cpp")
        one_line(caught.value)
        assert list(place.iterdir()) == []

    @pytest.mark.parametrize("at", [0, 3, 12, 40, 0.3, 0.5, 0.7, -6, -2])
    def test_damaged_bytes_are_one_line_and_nothing_is_written(self, at: float, tmp_path: Path, place: Path) -> None:
        data = source_package()
        damaged = bytearray(data)
        damaged[at if isinstance(at, int) else int(len(data) * at)] ^= 0xFF
        with pytest.raises(DynrunError, match="is damaged") as caught:
            unpack_source(pin_of(data), self.archive(tmp_path, bytes(damaged)), place / "llama.cpp")
        one_line(caught.value)
        assert list(place.iterdir()) == []

    def test_an_archive_of_something_else_is_one_line(self, tmp_path: Path, place: Path) -> None:
        with pytest.raises(DynrunError, match="is damaged"):
            unpack_source(pin_of(b""), self.archive(tmp_path, gzip.compress(b"a letter")), place / "llama.cpp")
        assert list(place.iterdir()) == []

    def test_an_unpacked_source_is_not_unpacked_again(self, tmp_path: Path, place: Path) -> None:
        data = source_package()
        target = unpack_source(pin_of(data), self.archive(tmp_path, data), place / "llama.cpp")
        assert unpack_source(pin_of(data), tmp_path / "gone.tar.gz", target) == target

    def test_another_pin_replaces_the_source_whole(self, tmp_path: Path, place: Path) -> None:
        old = source_package(lambda tar: add(tar, f"{NAME}/vendor/llama.cpp/old.cpp"))
        target = unpack_source(pin_of(old), self.archive(tmp_path, old), place / "llama.cpp")
        assert (target / "old.cpp").exists()
        new = source_package()
        unpack_source(pin_of(new), self.archive(tmp_path, new), target)
        assert not (target / "old.cpp").exists()

    def test_a_discarded_source_is_gone(self, tmp_path: Path, place: Path) -> None:
        data = source_package()
        target = unpack_source(pin_of(data), self.archive(tmp_path, data), place / "llama.cpp")
        discard_source(target)
        assert list(place.iterdir()) == []

    def test_an_interrupted_unpacking_leaves_nothing(
        self, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = source_package()
        archive = self.archive(tmp_path, data)
        with monkeypatch.context() as patch:
            patch.setattr(tarfile.TarFile, "makefile", interrupted_after(2))
            with pytest.raises(KeyboardInterrupt):
                unpack_source(pin_of(data), archive, place / "llama.cpp")
        assert list(place.iterdir()) == []
        assert (unpack_source(pin_of(data), archive, place / "llama.cpp") / "CMakeLists.txt").is_file()

    def test_after_a_killed_unpacking_the_next_one_goes_on_and_tidies_up(self, tmp_path: Path, place: Path) -> None:
        def many(tar: tarfile.TarFile) -> None:
            for number in range(8_000):
                add(tar, f"{NAME}/many/{number}")

        data = source_package(many)
        archive = self.archive(tmp_path, data)
        code = (
            "import sys; from pathlib import Path; from dynrun.llamacpp.source import Pin, unpack_source\n"
            f"unpack_source(Pin('p', '1', {sha256_bytes(data)!r}, '', ''), Path(sys.argv[1]), Path(sys.argv[2]))"
        )
        with subprocess.Popen([sys.executable, "-c", code, archive, place / "llama.cpp"]) as killed:
            while not list(place.glob(".unpack-*/*/many/1*")):
                assert killed.poll() is None
                time.sleep(0.01)
            killed.send_signal(signal.SIGKILL)
        assert [path.name[:8] for path in place.iterdir()] == [".unpack-"]
        small = source_package()
        unpack_source(pin_of(small), self.archive(tmp_path, small), place / "llama.cpp")
        assert [path.name for path in place.iterdir()] == ["llama.cpp"]


def interrupted_after(n: int) -> Callable[..., None]:
    """TarFile.makefile that a Ctrl+C hits at the ``n``-th file."""
    real, calls = tarfile.TarFile.makefile, 0

    def makefile(self: tarfile.TarFile, info: tarfile.TarInfo, path: str) -> None:
        nonlocal calls
        calls += 1
        if calls > n:
            raise KeyboardInterrupt
        real(self, info, path)

    return makefile


class TestPin:
    def test_the_committed_pin_is_complete(self) -> None:
        pin = read_pin()
        assert pin.archive_name == ARCHIVE
        assert len(pin.sha256) == 64
        assert pin == read_pin(repository_root() / "vendor" / "pin.toml")

    @pytest.mark.parametrize("text", ["", "package = 1 2", 'package = "p"\n[torch]\nversion = "1"\n', "[torch]\n"])
    def test_a_wrong_pin_is_one_line(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "pin.toml").write_text(text)
        with pytest.raises(DynrunError, match=r"pin\.toml cannot be read") as caught:
            read_pin(tmp_path / "pin.toml")
        one_line(caught.value)
