"""What the Models room asks of the Hub and of the model cache, in worker threads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dynrun.errors import NotFoundError, UsageError
from dynrun.tui.jobs import Job
from dynrun.tui.messages import Frozen
from dynrun.tui.words import size

if TYPE_CHECKING:
    from dynrun.hub.files import Variant
    from dynrun.hub.resolve import Found, HubName
    from dynrun.hub.search import Hit
    from dynrun.hub.transfer import Progress
    from dynrun.models import Listed


@dataclass(eq=False)
class PullProgress(Frozen):
    """How far the download of ``model`` is."""

    model: str
    progress: Progress


def search_hub(words: str) -> list[Hit]:
    """What the Hub finds. Raises what :func:`dynrun.hub.search.search` raises."""
    from dynrun.hub.search import search

    return search(words)


def open_repository(name: str) -> tuple[Found, frozenset[str]]:
    """The repository's quants, and the paths of the files that are on this machine."""
    from dynrun.hub.cache import is_here
    from dynrun.hub.resolve import find, parse_name

    found = find(parse_name(name), _first)
    return found, frozenset(file.path for file in found.repository.files if is_here(file))


def name_of(found: Found, variant: Variant) -> str:
    """MODEL of one quant, as `pull` takes it: by its label where no other has the same."""
    same = [other for other in found.shelf.quants if other.label == variant.label]
    by_label = len(same) == 1 and variant in found.shelf.quants
    return str(replace(found.name, quant=variant.label if by_label else variant.first.path))


def pull(job: Job, model: str) -> None:
    """Bring ``model`` here, telling the room how far it is. Raises what :func:`dynrun.hub.pull.pull` raises."""
    from dynrun.hub.pull import pull as fetch
    from dynrun.hub.resolve import find, parse_name
    from dynrun.hub.variants import choose

    found = find(parse_name(model), _nobody)
    variant = choose(found.shelf, found.name.quant, found.repository.name)

    def watch(progress: Progress) -> None:
        job.check()
        job.post(PullProgress(model, progress))

    job.check()
    fetch(variant.files, found.repository.revision, watch=watch)


def discard(model: str) -> int:
    """Remove what has come of an unfinished download; the bytes that it frees."""
    from dynrun.hub.cache import repository_folder
    from dynrun.hub.part import NOTE_SUFFIX, SUFFIX
    from dynrun.hub.resolve import parse_name

    name, freed = parse_name(model), 0
    for note in (repository_folder(name.repository) / "blobs").glob(f"*{NOTE_SUFFIX}"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if not _is_of(json.loads(note.read_text(encoding="utf-8"))["path"], name):
                continue
            bytes_file = note.with_name(note.name.removesuffix(NOTE_SUFFIX) + SUFFIX)
            freed += bytes_file.stat().st_blocks * 512
            bytes_file.unlink()
            note.unlink()
    return freed


@dataclass(frozen=True)
class Removal:
    """What the user is asked before a model is deleted, and how that is done."""

    question: str
    freed_bytes: int
    execute: Callable[[], None]


def plan_deletion(model: Listed) -> Removal:
    """Of a made, built-in or pulled model. Raises NotFoundError where it is gone already."""
    from dynrun.hub.local import find_local, plan_removal
    from dynrun.hub.resolve import parse_name
    from dynrun.models import kept

    own = kept(model.name)
    if own is not None:
        names, freed, execute = own.names, own.freed_bytes, own.execute
    else:
        local = find_local(parse_name(model.name))
        removal = plan_removal(local.repository, [file.path for file in local.variant.files])
        names, freed, execute = removal.names, removal.freed_bytes, removal.execute
    listed = "\n".join(str(name) for name in names)
    return Removal(f"Delete {model.name}? It frees {size(freed)}.\n\n{listed}", freed, execute)


def _is_of(path: str, name: HubName) -> bool:
    """Whether the file at ``path`` of the repository belongs to what ``name`` names."""
    from dynrun.hub.files import RemoteFile
    from dynrun.hub.variants import matching, shelve

    shelf = shelve([RemoteFile(name.repository, "", path, 0, "")])
    return bool(matching(shelf, name.quant))


def _first(_: str, candidates: Sequence[str]) -> str:
    # In the list of hits the user has chosen already; a sibling is named in the note.
    return candidates[0]


def _nobody(question: str, candidates: Sequence[str]) -> str:
    if not candidates:
        raise NotFoundError(question, fix="check the name")
    raise UsageError(f"{question} {', '.join(candidates)}", fix="choose one in the list of the Hub's search")
