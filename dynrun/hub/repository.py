"""What a repository of the Hub has at its newest commit."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from dynrun.errors import DynrunError
from dynrun.hub.errors import errors_for_people
from dynrun.hub.files import RemoteFile, Repository

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

MAIN = "main"
_MOST_FILES, _MOST_BYTES = 100_000, 1 << 50
_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)


def fetch_repository(name: str, revision: str = MAIN) -> Repository:
    """The files of ``name`` (owner/repository) at ``revision``, with sizes and hashes.

    Raises what :func:`dynrun.hub.errors.errors_for_people` raises; DynrunError where a name or a hash that the server
    gives would lead out of the cache.
    """
    from huggingface_hub import HfApi, RepoFile

    api = HfApi()
    with errors_for_people(name):
        info = api.model_info(name, revision=revision, timeout=30.0)
        # Pages follow each other for as long as the server says so.
        tree = list(islice(api.list_repo_tree(name, recursive=True, revision=info.sha), _MOST_FILES + 1))
        if len(tree) > _MOST_FILES:
            raise _distrusted(f"the repository {name} lists more than {_MOST_FILES:,} files")
        commit = _hex(info.sha or "", 40, f"the commit of {name}")
        # The Hub's spelling: names are found in any case, and by old names, and the cache knows one.
        listed = _checked_name(info.id or name)
        files = [_remote_file(listed, commit, entry) for entry in tree if isinstance(entry, RepoFile)]
    return Repository(listed, commit, revision, tuple(files))


def _remote_file(repository: str, commit: str, entry: RepoFile) -> RemoteFile:
    path = entry.path
    if not stays_inside(path):
        raise _distrusted(f"the repository {repository} has a file named {path[:80]!r}, which leaves its folder")
    if not (isinstance(entry.size, int) and 0 <= entry.size < _MOST_BYTES):
        raise _distrusted(f"the repository {repository} says that {path[:80]} has {str(entry.size)[:20]} bytes")
    sha256 = _hex(entry.lfs.sha256, 64, f"the hash of {path}") if entry.lfs else ""
    etag = sha256 or _hex(entry.blob_id, 40, f"the hash of {path}")
    return RemoteFile(repository, commit, path, entry.size, etag, sha256, str(entry.xet_hash or ""))


def stays_inside(path: str) -> bool:
    """Whether a file's path stays in its folder, under the rules of every system, and is harmless on a terminal."""
    if not path.isprintable():
        return False
    parts = path.split("/")
    windows = [PureWindowsPath(part) for part in parts]
    absolute = PurePosixPath(path).is_absolute() or any(part.drive or part.root for part in windows)
    return not absolute and "\\" not in path and not {"", ".", ".."} & set(parts)


def is_name(name: str) -> bool:
    """Whether ``name`` can be a repository's."""
    return bool(_NAME.fullmatch(name)) and ".." not in name


def _checked_name(name: str) -> str:
    if not is_name(name):
        raise _distrusted(f"the server calls the repository {name[:80]!r}")
    return name


def _hex(text: str, length: int, what: str) -> str:
    if len(text) != length or not all(character in "0123456789abcdef" for character in text):
        raise _distrusted(f"{what} is no hash: {text[:80]!r}")
    return text


def _distrusted(message: str) -> DynrunError:
    return DynrunError(message, fix="nothing was downloaded; do not trust this repository")
