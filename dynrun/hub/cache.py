"""The cache that all programs of the Hub share: where files lie in it, and how they get there.

A repository's folder has ``blobs/<etag>``, ``snapshots/<commit>/<path>`` (links to blobs) and ``refs/<branch>``, as
huggingface_hub describes it in file_download.py. `hf cache` and every other program find what is placed here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dynrun.artifacts import file_lock, link_or_copy, translated_os_errors, write_text
from dynrun.errors import DynrunError
from dynrun.hub.files import RemoteFile
from dynrun.hub.repository import stays_inside

# Before a model repository's name, whose slash becomes two dashes.
MODELS = "models--"


def cache_folder() -> Path:
    """HF_HUB_CACHE, or ``hub`` in HF_HOME (it need not exist), as constants.py of huggingface_hub has it."""
    # Not imported for this: `ls` answers at once.
    if library := sys.modules.get("huggingface_hub.constants"):
        return Path(library.HF_HUB_CACHE).absolute()
    if named := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return _expanded(named)
    if home := os.environ.get("HF_HOME"):
        return _expanded(home) / "hub"
    return _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(path)).expanduser().absolute()


def repository_folder(repository: str) -> Path:
    """The folder of a model repository."""
    return cache_folder() / f"{MODELS}{repository.replace('/', '--')}"


def blob_path(file: RemoteFile) -> Path:
    """Where the bytes of ``file`` lie."""
    return repository_folder(file.repository) / "blobs" / file.etag


def snapshot_path(file: RemoteFile) -> Path:
    """Where programs look for ``file``. Raises DynrunError where its name leads elsewhere."""
    if not stays_inside(file.path) or not stays_inside(file.commit) or not stays_inside(file.etag):
        raise DynrunError(f"{file.path[:80]!r} would lie outside of the cache", fix="do not trust this repository")
    return repository_folder(file.repository) / "snapshots" / file.commit / file.path


def has_blob(file: RemoteFile) -> bool:
    """Whether the bytes are there, with the right size: a blob is whole or absent."""
    with suppress(OSError):
        return blob_path(file).stat().st_size == file.size
    return False


def is_here(file: RemoteFile) -> bool:
    """Whether programs find ``file``."""
    with suppress(OSError):
        return snapshot_path(file).stat().st_size == file.size
    return False


@contextmanager
def locked(file: RemoteFile) -> Iterator[None]:
    """Fetch ``file`` in one process at a time, also among the programs that use huggingface_hub."""
    folder = repository_folder(file.repository)
    lock = cache_folder() / ".locks" / folder.name / f"{file.etag}.lock"
    with file_lock(lock, waiting=f"another program is downloading {file.name}; waiting for it"):
        yield


def prepare(file: RemoteFile) -> None:
    """Make the folders, so that `hf cache` knows the repository while it is on its way."""
    with translated_os_errors(cache_folder()):
        blob_path(file).parent.mkdir(parents=True, exist_ok=True)
        snapshot_path(file).parent.mkdir(parents=True, exist_ok=True)


def place(file: RemoteFile) -> Path:
    """Let programs find the blob of ``file`` under its name; a copy where the disk has no links."""
    blob, pointer = blob_path(file), snapshot_path(file)
    if is_here(file):
        return pointer
    with translated_os_errors(pointer):
        pointer.parent.mkdir(parents=True, exist_ok=True)
        temporary = pointer.with_name(f".{file.etag[:16]}.{os.getpid()}.link")
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError:
            link_or_copy(blob, pointer)
        else:
            temporary.replace(pointer)
    return pointer


def set_ref(repository: str, revision: str, commit: str) -> None:
    """Note that ``revision`` (a branch or tag) is at ``commit``, whose snapshot must exist."""
    if revision == commit:
        return
    if not stays_inside(revision):
        raise DynrunError(f"{revision[:80]!r} names no branch", fix="write owner/repo@branch")
    path = repository_folder(repository) / "refs" / revision
    with suppress(OSError):
        if path.read_text(encoding="utf-8") == commit:
            return
    write_text(path, commit)
