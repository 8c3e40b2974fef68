"""Bring files of the Hub into the shared cache: whole and checked, or with what came kept for the next time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dynrun.artifacts import translated_os_errors
from dynrun.errors import DoesNotFitError, NetworkError, NotFoundError
from dynrun.hub import cache
from dynrun.hub.errors import errors_for_people
from dynrun.hub.files import RemoteFile, amount
from dynrun.hub.http import CONNECT_S
from dynrun.hub.part import NOTE_SUFFIX, Part, forget_note, stale_parts
from dynrun.hub.repository import fetch_repository
from dynrun.hub.source import ChangedError
from dynrun.hub.transfer import Progress, Transfer, TransferSettings

_CHANGES = 3
_METADATA_ATTEMPTS = 4


@dataclass(frozen=True)
class PulledFile:
    """``path`` is where programs find it; ``sha256`` is empty for a small file that git itself keeps."""

    path: Path
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Pulled:
    """``resumed_bytes`` had come in earlier runs, ``fetched_bytes`` came in this one, what was wrong included."""

    files: tuple[PulledFile, ...]
    resumed_bytes: int
    fetched_bytes: int
    elapsed_s: float


def pull(
    files: Sequence[RemoteFile],
    revision: str,
    *,
    settings: TransferSettings | None = None,
    watch: Callable[[Progress], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> Pulled:
    """Bring ``files``, all of one repository at one commit, here; ``revision`` is what led to the commit.

    ``watch`` is called often in this thread; what it raises ends the pull. Raises DoesNotFitError before anything is
    fetched where the disk is too small for all, RefusedError, NotFoundError, NetworkError.
    """
    started = time.monotonic()
    settings = settings or TransferSettings()
    counts = _Counts()
    for _ in range(_CHANGES):
        try:
            _fetch_missing(files, settings, watch, say, counts)
            break
        except ChangedError:
            files = _changed(files, revision)
            say(f"{files[0].repository} changed meanwhile; going on with commit {files[0].commit[:8]}")
    else:
        raise NetworkError(f"{files[0].repository} changes again and again", fix="try again later")
    pulled = [PulledFile(cache.place(file), file.size, file.sha256) for file in files]
    for file in files:
        forget_note(cache.blob_path(file))
    cache.set_ref(files[0].repository, revision, files[0].commit)
    return Pulled(tuple(pulled), counts.resumed, counts.fetched, time.monotonic() - started)


@dataclass
class _Counts:
    resumed: int = 0
    fetched: int = 0


def _fetch_missing(
    files: Sequence[RemoteFile],
    settings: TransferSettings,
    watch: Callable[[Progress], None],
    say: Callable[[str], None],
    counts: _Counts,
) -> None:
    """Bring the blobs of ``files`` here. Raises ChangedError where the server has others by now."""
    # The same bytes may have two names.
    by_etag = {file.etag: file for file in files}
    with ExitStack() as locks:
        for etag in sorted(by_etag):
            if not cache.has_blob(by_etag[etag]):
                locks.enter_context(cache.locked(by_etag[etag]))
        missing = [file for file in by_etag.values() if not cache.has_blob(file)]
        if not missing:
            return
        # One for all: access is the repository's, and ranges notice by themselves that a file is another one.
        _ask(missing[0], settings)
        for file in missing:
            _drop_stale(file, say)
        parts = [Part(file, cache.blob_path(file)) for file in missing]
        counts.resumed += sum(part.resumed_bytes for part in parts)
        _check_disk(parts)
        for file in missing:
            cache.prepare(file)
        transfer = Transfer(parts, settings, lambda part: _place(part.file))
        try:
            transfer.run(watch)
        finally:
            counts.fetched += transfer.fetched_bytes


def _place(file: RemoteFile) -> None:
    cache.place(file)


def _ask(file: RemoteFile, settings: TransferSettings) -> None:
    """See that the server has ``file`` and gives it to us, before anything is fetched.

    Lists of files are public also where the files are gated. Raises what the Hub's refusals are, ChangedError.
    """
    from huggingface_hub import get_hf_file_metadata

    for attempt in range(_METADATA_ATTEMPTS):
        try:
            with errors_for_people(file.repository):
                found = get_hf_file_metadata(file.url, timeout=max(settings.stall_s, CONNECT_S))
            break
        except NetworkError:
            if attempt == _METADATA_ATTEMPTS - 1:
                raise
            time.sleep(settings.backoff_s * 2**attempt)
    if found.size not in (None, file.size) or (file.sha256 and found.etag not in (None, file.sha256)):
        raise ChangedError


def _drop_stale(file: RemoteFile, say: Callable[[str], None]) -> None:
    """Remove what had come of an earlier version of ``file``: no byte of it is known to be in this one."""
    stale = stale_parts(cache.blob_path(file).parent, file.path, file.etag)
    if any(path.stat().st_size for path in stale if not path.name.endswith(NOTE_SUFFIX)):
        say(f"{file.path} is another file on the Hub since it was begun; it is fetched from the start")
    for path in stale:
        path.unlink(missing_ok=True)


def _check_disk(parts: Sequence[Part]) -> None:
    folder = cache.cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    needed = sum(part.file.size - part.done_bytes for part in parts)
    with translated_os_errors(existing):
        free = shutil.disk_usage(existing).free
    if needed > free:
        raise DoesNotFitError(
            f"{amount(needed)} are to be downloaded, and the disk of {folder} has {amount(free)} free",
            fix=f"free {amount(needed - free)}, or set HF_HOME to a folder on a larger disk",
        )


def _changed(files: Sequence[RemoteFile], revision: str) -> list[RemoteFile]:
    """The same names as the Hub has them now."""
    repository = fetch_repository(files[0].repository, revision)
    now = {file.path: file for file in repository.files}
    for file in files:
        if file.path not in now:
            raise NotFoundError(f"{repository.name} has {file.path} no longer", fix="choose again: dynrun pull")
    if all(now[file.path].etag == file.etag for file in files):
        raise NetworkError(
            f"the server has other files of {repository.name} than it lists",
            fix="try again later, or another HF_ENDPOINT",
        )
    return [now[file.path] for file in files]
