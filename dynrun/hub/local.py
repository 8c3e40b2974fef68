"""Which models of the Hub are in the cache of this machine, whoever put them there, and how to take them out again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dynrun.errors import NotFoundError
from dynrun.gguf.shards import split_name
from dynrun.hub.cache import MODELS, cache_folder, repository_folder, snapshot_path
from dynrun.hub.files import RemoteFile, Shelf, Variant
from dynrun.hub.part import stale_parts
from dynrun.hub.repository import MAIN
from dynrun.hub.resolve import HubName
from dynrun.hub.variants import choose, shelve

if TYPE_CHECKING:
    from huggingface_hub import DeleteCacheStrategy


@dataclass(frozen=True)
class LocalModel:
    """A quant that is here: ``path`` is the first shard's."""

    repository: str
    variant: Variant

    @property
    def name(self) -> str:
        """As commands take it."""
        return f"{self.repository}:{self.variant.label}"

    @property
    def path(self) -> Path:
        return snapshot_path(self.variant.first)

    @property
    def stem(self) -> str:
        """The file's name without what says that it is a GGUF, or a shard of one."""
        return split_name(self.path)


def local_models() -> list[LocalModel]:
    """Every quant in the cache of which no shard is missing."""
    found = []
    for repository in _repositories():
        found += [LocalModel(repository, v) for v in local_shelf(repository).quants if not v.missing]
    return found


def find_local(name: HubName) -> LocalModel:
    """The quant in the cache that ``name`` means; its ``-GGUF`` sibling's counts too.

    Raises NotFoundError where none is, and what :func:`dynrun.hub.variants.choose` raises.
    """
    here = {repository.casefold(): repository for repository in _repositories()}
    for spelling in (name.repository, f"{name.repository}-GGUF"):
        repository = here.get(spelling.casefold())
        if repository and (shelf := local_shelf(repository)).quants:
            with suppress(NotFoundError):
                return LocalModel(repository, choose(shelf, name.quant, f"{repository} on this machine"))
    raise NotFoundError(f"{name} is not on this machine", fix=f"get it: dynrun pull {name}")


def local_shelf(repository: str) -> Shelf:
    """What is here of ``repository``, each file of the newest commit that has it, the branch `main` first.

    A quant's shards are of one commit: llama.cpp looks for them in one folder.
    """
    quants: dict[str, Variant] = {}
    companions: dict[str, dict[str, Variant]] = {}
    for commit in _commits(repository):
        shelf = shelve(list(_files(repository, commit)))
        _add(quants, shelf.quants)
        for kind, variants in shelf.companions.items():
            _add(companions.setdefault(kind, {}), variants)
    return Shelf(tuple(quants.values()), {kind: tuple(found.values()) for kind, found in companions.items()})


def _add(known: dict[str, Variant], found: Sequence[Variant]) -> None:
    for variant in found:
        before = known.get(variant.first.path)
        if before is None or (before.missing and not variant.missing):
            known[variant.first.path] = variant


def _repositories() -> list[str]:
    folders = sorted(path for path in cache_folder().glob(f"{MODELS}*") if (path / "snapshots").is_dir())
    return [path.name.removeprefix(MODELS).replace("--", "/", 1) for path in folders]


def _commits(repository: str) -> list[str]:
    folder = repository_folder(repository)
    snapshots = [path for path in (folder / "snapshots").iterdir() if path.is_dir()]
    snapshots.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    main = ""
    with suppress(OSError):
        main = (folder / "refs" / MAIN).read_text(encoding="utf-8")
    return sorted((path.name for path in snapshots), key=lambda commit: commit != main)


def _files(repository: str, commit: str) -> Iterator[RemoteFile]:
    folder = repository_folder(repository) / "snapshots" / commit
    for path in sorted(folder.rglob("*.gguf")):
        # A link whose blob is gone is no file.
        with suppress(OSError):
            size, etag = path.stat().st_size, path.resolve().name if path.is_symlink() else ""
            yield RemoteFile(repository, commit, path.relative_to(folder).as_posix(), size, etag)


@dataclass(frozen=True)
class Removal:
    """What removing a quant would take away: ``freed_bytes``, as blobs that other files share stay."""

    names: tuple[str, ...]
    freed_bytes: int
    strategy: DeleteCacheStrategy
    parts: tuple[Path, ...]

    def execute(self) -> None:
        """Take it away; links before blobs, so that an interruption leaves nothing broken."""
        self.strategy.execute()
        for path in self.parts:
            path.unlink(missing_ok=True)


def plan_removal(repository: str, paths: Sequence[str] | None) -> Removal:
    """Removing ``paths`` (None: everything) of ``repository``, of all commits, and what is on its way of them.

    Raises NotFoundError where nothing of it is here.
    """
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir(cache_folder())
    except CacheNotFound:
        raise NotFoundError(f"{repository} is not on this machine", fix="see dynrun ls") from None
    folder = repository_folder(repository)
    found = next((repo for repo in cache.repos if repo.repo_path == folder.resolve()), None)
    files = {
        file: file.file_path.relative_to(revision.snapshot_path).as_posix()
        for revision in (found.revisions if found else ())
        for file in revision.files
    }
    chosen = [file for file, path in files.items() if paths is None or path in paths]
    wanted: Sequence[str | None] = paths or (None,)
    parts = [part for path in wanted for part in stale_parts(folder / "blobs", path)]
    if found is None or not (chosen or parts):
        raise NotFoundError(f"nothing of {repository} is on this machine", fix="see dynrun ls")
    if len(chosen) == len(files):
        strategy = cache.delete_revisions(*(revision.commit_hash for revision in found.revisions))
    else:
        strategy = cache.delete_files(*chosen)
    # Sparse: what was not fetched yet takes no room.
    freed = strategy.expected_freed_size + sum(part.stat().st_blocks * 512 for part in parts)
    names = tuple(sorted({path for file, path in files.items() if file in set(chosen)}))
    return Removal(names, freed, strategy, tuple(parts))
