"""The pinned llama.cpp source: fetched through pip as it is configured here, checked, unpacked.

Takes ``vendor/pin.toml``, gives ``vendor/llama.cpp`` and the archive that the bindings are installed from. Does not
compile. Standard library only: build.py imports this.
"""

from __future__ import annotations

import gzip
import shutil
import tarfile
import tempfile
import tomllib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynrun.artifacts import discard, file_lock, sha256_file, translated_os_errors, write_text
from dynrun.errors import DoesNotFitError, DynrunError, NetworkError
from dynrun.llamacpp.process import Completed, capture, new_log
from dynrun.paths import downloads_dir, repository_root

_STAMP = ".unpacked-from"
_UNPACKING = ".unpack-"
_NETWORK_WORDS = (
    *("NewConnectionError", "ConnectionError", "Temporary failure in name", "Max retries", "timed out", "Network is"),
    *("Connection broken", "IncompleteRead", "incomplete-download", "HTTP error 5"),
)
# What pip says of the pinned packages where no index answers, when it has no retries to tell of.
_NOTHING_FOUND = "(from versions: none)"


@dataclass(frozen=True)
class Pin:
    """What ``vendor/pin.toml`` says."""

    package: str
    version: str
    sha256: str
    llama_cpp_commit: str
    torch_version: str

    @property
    def archive_name(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}.tar.gz"


def read_pin(path: Path | None = None) -> Pin:
    """Read the pin. Raises DynrunError where it is missing or incomplete."""
    path = path or repository_root() / "vendor" / "pin.toml"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        torch_version = str(data.pop("torch")["version"])
        return Pin(**data, torch_version=torch_version)
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise DynrunError(
            f"{path} cannot be read: {error}", fix="restore it with `git checkout vendor/pin.toml`"
        ) from error


def fetch_archive(pin: Pin, python: Path) -> Path:
    """The verified source archive, downloaded by pip on the first call.

    Raises NetworkError where the index cannot be reached, DynrunError where the download is not the pinned one: it is
    removed and never unpacked.
    """
    archive, prefix = downloads_dir() / pin.archive_name, f".{pin.archive_name}-"
    waiting = "another build is downloading; waiting for it"
    with file_lock(downloads_dir() / f"{pin.archive_name}.lock", waiting=waiting):
        _remove_leftovers(archive.parent, prefix)
        if archive.is_file():
            if sha256_file(archive) == pin.sha256:
                return archive
            archive.unlink()
        with translated_os_errors(archive), tempfile.TemporaryDirectory(dir=archive.parent, prefix=prefix) as folder:
            requirement = f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}"
            pip_download(requirement, pin.archive_name, python, Path(folder), flags=("--no-binary", ":all:"))
            found = Path(folder) / pin.archive_name
            if not found.is_file() or sha256_file(found) != pin.sha256:
                raise WrongHashError(pin.archive_name)
            found.replace(archive)
    return archive


def pip_download(requirement: str, what: str, python: Path, folder: Path, *, flags: Sequence[str] = ()) -> None:
    """Download one ``name==version --hash=sha256:…`` into ``folder`` from the sources that pip is configured with.

    With a hash in the requirement pip itself refuses another file before it opens it. Raises NetworkError where the
    index cannot be reached, WrongHashError for another file.
    """
    file = folder / "requirement.txt"
    write_text(file, requirement + "\n")
    argv: list[str | Path] = [python, "-m", "pip", "download", "--no-deps", "--no-build-isolation", *flags]
    argv += ["--require-hashes", "--disable-pip-version-check", "-d", folder, "-r", file]
    done = capture(argv, log=new_log("pip-download"), check=False)
    if done.exit_code:
        raise explain_pip_failure(done, what)


def explain_pip_failure(done: Completed, what: str) -> DynrunError:
    """The error for a failed pip call that wanted ``what``: network, hash, disk, or pip's own words."""
    text = "\n".join((*done.stderr_tail, done.stdout[-4000:]))
    if "DO NOT MATCH THE HASHES" in text:
        return WrongHashError(what, log=done.log)
    if "No space left" in text:
        return DoesNotFitError(f"the disk became full while installing {what}", fix="free some space", log=done.log)
    if any(word in text for word in _NETWORK_WORDS):
        message = f"the package index cannot be reached for {what}"
        return NetworkError(message, fix="check the network, run it again", log=done.log)
    if _NOTHING_FOUND in text:
        message = f"no package index that pip knows here can be reached or has {what}"
        return NetworkError(message, fix="check the network and `pip config list`, run it again", log=done.log)
    reasons = [line.strip() for line in text.splitlines() if line.startswith("ERROR:")]
    reason = reasons[0].removeprefix("ERROR: ") if reasons else "no reason given"
    return DynrunError(f"pip could not get {what}: {reason[:300]}", fix="see the log", log=done.log)


class WrongHashError(DynrunError):
    """A download is not the pinned file; it has been removed and was never unpacked."""

    def __init__(self, what: str, *, log: Path | None = None) -> None:
        super().__init__(
            f"the download of {what} does not have the pinned sha256; it was removed",
            fix="run it again; if it stays so, the package index serves another file than the pinned one",
            log=log,
        )


def unpack_source(pin: Pin, archive: Path, target: Path | None = None) -> Path:
    """Unpack the archive's ``vendor/llama.cpp`` to ``target``, whole or not at all.

    One process at a time: build.py holds the clone's lock. Raises DynrunError for an archive that is damaged or has an
    unsafe member.
    """
    target = target or repository_root() / "vendor" / "llama.cpp"
    stamp = target / _STAMP
    if stamp.is_file() and stamp.read_text().strip() == pin.sha256:
        return target
    with translated_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.parent, _UNPACKING)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=_UNPACKING) as folder:
            whole = Path(folder)
            _extract(archive, whole)
            source = whole / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
            if not (source / "CMakeLists.txt").is_file():
                raise DynrunError(
                    f"{archive} holds no vendor/llama.cpp", fix="remove it and run python3 build.py again"
                )
            (source / _STAMP).write_text(pin.sha256 + "\n")
            discard(target, _STAMP)
            source.rename(target)
    return target


def discard_source(target: Path | None = None) -> None:
    """Remove the unpacked source."""
    discard(target or repository_root() / "vendor" / "llama.cpp", _STAMP)


def _remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove the temporary folders of runs that were killed."""
    for left in folder.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)


def _extract(archive: Path, folder: Path) -> None:
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            # Every member is looked at before the first is written, and the end read: it holds the checksum.
            members = list(_safe_members(archive, tar))
            while stream.read(1 << 20):
                pass
            # Python 3.11.4 has the filter; the members are safe without.
            keyword = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extractall(folder, members=members, **keyword)  # type: ignore[arg-type]  # noqa: S202
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DynrunError(f"{archive} is damaged: {error}", fix="remove it and run python3 build.py again") from error


def _safe_members(archive: Path, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members, all of them plain files and folders inside; a source package has no links, so none can lead out."""
    for member in tar:
        if _leaves(member.name) or not (member.isfile() or member.isdir()):
            raise DynrunError(
                f"{archive} has an unsafe member {member.name!r}; nothing was unpacked",
                fix="remove it; do not use the place it came from",
            )
        yield member


def _leaves(path: str) -> bool:
    """Whether a path is absolute or has a part ``..``, on any platform."""
    path = path.replace("\\", "/")
    return path.startswith("/") or path[1:2] == ":" or ".." in path.split("/") or "\0" in path
