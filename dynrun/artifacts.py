"""Files that are whole or absent, and stage results found again by their inputs.

A stage's folder is ``stages/<name>/<key>``, its key the hash of everything the result depends on. Files are
written under temporary names and renamed; ``manifest.json`` is written last, so a folder without one is
unfinished work that may be continued. Standard library only: build.py imports this.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dynrun import __version__
from dynrun.errors import MALFORMED, DoesNotFitError, DynrunError, NotFoundError, UsageError
from dynrun.paths import cache_dir, stages_dir

MANIFEST = "manifest.json"
Item = TypeVar("Item")


@contextmanager
def translated_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a refused write into an error for people, naming ``path``."""
    try:
        yield
    except OSError as error:
        # numpy's tofile says a short write ("N requested and M written") without an errno.
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno is None and "requested and" in str(error)):
            raise DoesNotFitError(
                f"the disk is full while writing {path}", fix="free some space and run the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DynrunError(f"cannot write {path}: {error.strerror}", fix="check its permissions") from error
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it there on success, remove it on failure."""
    with translated_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("r+b") as stream:
                os.fsync(stream.fileno())
            # mkstemp makes private files; the result is as readable as any file the user makes.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def discard(folder: Path, marker: str) -> None:
    """Remove ``folder``, first the file in it that says it is whole: what a killed removal leaves is not trusted."""
    with translated_os_errors(folder):
        (folder / marker).unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)


def freed_bytes(paths: Iterable[Path]) -> int:
    """Bytes that are free when these files and folders are gone; a file with another name elsewhere frees none."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else (path,))]
    return sum(file.stat().st_size for file in files if file.is_file() and file.stat().st_nlink == 1)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_toml(path: Path, option: str) -> dict[str, Any]:
    """A TOML file that the user named with ``option``. Raises NotFoundError, UsageError."""
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist", fix=f"check the path of {option}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}", fix="correct it") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", fix="check its permissions") from error


def read_lines(path: Path, parse: Callable[[Any], Item], *, mend: bool = True) -> list[Item]:
    """What ``parse`` makes of each line of JSON that :func:`append_line` wrote; none where there is no file.

    A line torn by a kill, or one that ``parse`` refuses (ValueError, TypeError), is dropped, from the file too if it
    is to ``mend``: not while others may write to it.
    """
    found, whole = [], []
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for line in text.splitlines():
        try:
            found.append(parse(json.loads(line)))
        except (ValueError, TypeError):
            continue
        whole.append(line)
    mended = "".join(f"{line}\n" for line in whole)
    if mend and mended != text:
        path.write_text(mended, encoding="utf-8")
    return found


def append_line(path: Path, value: Any) -> None:
    """Add ``value`` as a line of JSON, on disk before this returns."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(value) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON to ``path`` atomically."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def link_or_copy(source: Path, target: Path) -> None:
    """``source`` under the name ``target`` too, replacing what is there: a hard link where the disk allows it."""
    with translated_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            temporary.hardlink_to(source)
            temporary.replace(target)
        except OSError:
            with atomic_path(target) as copy:
                shutil.copyfile(source, copy)
        finally:
            # Renaming onto another link of the same file does nothing.
            temporary.unlink(missing_ok=True)


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file; remembered by path, size and modification time, as models are large."""
    stat = path.stat()
    identity = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}"
    memo = cache_dir() / "hashes" / sha256_bytes(identity.encode())
    with suppress(OSError):
        remembered = memo.read_text()
        if len(remembered) == 64:
            return remembered
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    # A full disk must not fail a mere hash.
    with suppress(OSError, DynrunError):
        write_text(memo, digest)
    return digest


def key_of(inputs: Mapping[str, Any]) -> str:
    """The content address of ``inputs`` (JSON-serializable): 24 hex digits."""
    return sha256_bytes(json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode())[:24]


@contextmanager
def file_lock(path: Path, *, waiting: str = "") -> Iterator[None]:
    """Hold an exclusive lock on ``path`` across processes; print ``waiting`` once if somebody has it.

    The operating system drops the lock when its holder dies, so a killed run never blocks the next. Raises DynrunError
    where the file system has no locks.
    """
    with translated_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+b")
    try:
        announced = False
        while not _try_lock(path, stream.fileno()):
            if waiting and not announced:
                # Narration, like all of it: stdout is for what a command gives.
                print(waiting, file=sys.stderr, flush=True)
                announced = True
            time.sleep(0.2)
        yield
    finally:
        stream.close()


@contextmanager
def lock_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock of :func:`file_lock` if nobody has it; whether it is held. Raises DynrunError as that does."""
    with translated_os_errors(path):
        stream = path.open("a+b")
    with stream:
        yield _try_lock(path, stream.fileno())


def _try_lock(path: Path, descriptor: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise DynrunError(f"cannot lock {path}: {error.strerror}", fix="set DYNRUN_CACHE to a local disk") from error
    return True


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage result."""

    name: str
    key: str
    path: Path
    inputs: Mapping[str, Any]

    @property
    def complete(self) -> bool:
        """Whether the manifest is there, and each file that it names with its size."""
        try:
            files: dict[str, int] = self.manifest()["files"]
            return all((self.path / name).stat().st_size == size for name, size in files.items())
        except (OSError, *MALFORMED):
            return False

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def manifest(self) -> dict[str, Any]:
        """The manifest of a complete folder."""
        manifest: dict[str, Any] = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        return manifest

    def commit(self, result: Mapping[str, Any], *, elapsed_s: float) -> None:
        """Declare the result complete. ``result`` is plain data that a later run reads back."""
        files = {p.name: p.stat().st_size for p in self.path.iterdir() if p.is_file() and p.name != MANIFEST}
        manifest = {
            "files": files,
            "stage": self.name,
            "key": self.key,
            "inputs": dict(self.inputs),
            "dynrun": __version__,
            "elapsed_s": round(elapsed_s, 3),
            "result": dict(result),
        }
        write_json(self.path / MANIFEST, manifest)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let one process at a time work on this result."""
        with file_lock(self.path.with_suffix(".lock")):
            with translated_os_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                if not self.complete:
                    # Temporary files of a run that was killed: nobody else works here, we hold the lock.
                    for leftover in self.path.glob(".*.part"):
                        leftover.unlink()
            yield


def stage_folder(name: str, inputs: Mapping[str, Any]) -> StageFolder:
    """The folder for stage ``name`` with ``inputs`` (hashes, settings, versions; JSON-serializable)."""
    key = key_of(inputs)
    return StageFolder(name=name, key=key, path=stages_dir() / name / key, inputs=inputs)


@dataclass(frozen=True)
class Outcome:
    """A stage's ``result``, the time it took when it was made, and whether that was in an earlier run."""

    name: str
    result: Mapping[str, Any]
    elapsed_s: float
    cached: bool


def run_stage(folder: StageFolder, work: Callable[[StageFolder], Mapping[str, Any]]) -> Outcome:
    """The result in ``folder``, by ``work`` where it is not there yet; ``work`` finds what an interrupted run left."""
    with folder.locked():
        if folder.complete:
            manifest = folder.manifest()
            return Outcome(folder.name, manifest["result"], manifest["elapsed_s"], cached=True)
        started = time.monotonic()
        with translated_os_errors(folder.path):
            result = work(folder)
            elapsed_s = time.monotonic() - started
            folder.commit(result, elapsed_s=elapsed_s)
        return Outcome(folder.name, result, elapsed_s, cached=False)
