"""From what the user calls a model to the folder with its safetensors, fetched from the Hub where it is one's name.

Of a repository only what a conversion reads comes here: no code, no pickles, no second copy in another format.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynrun.convert.environment import Say
from dynrun.convert.folder import wanted_of
from dynrun.errors import NetworkError, NotFoundError
from dynrun.gguf.tensor_types import FULL_PRECISION
from dynrun.hub.files import RemoteFile, Repository, Variant

if TYPE_CHECKING:
    from dynrun.hub.resolve import HubName


def model_folder(model: str, say: Say) -> Path:
    """The folder that ``model`` names. Raises NotFoundError, and what fetching a repository raises."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists() or path.is_absolute() or model.startswith("."):
        raise NotFoundError(f"{model} is no folder", fix="give a folder with safetensors and config.json")
    return fetch_folder(model, say)


def reference_source(model: str, say: Say) -> Path | None:
    """Where the reference of repository ``model`` is made of: its own GGUF of full precision, else its safetensors.

    Fetched first, or what is here of it where there is no network. None where ``model`` names a quant, or no
    repository, or one with neither.
    """
    if (name := _whole_repository(model)) is None:
        return None
    try:
        repository, variant = _found(name)
    except NetworkError:
        return _snapshot_here(name.repository)
    if variant is None:
        return _pull_folder(repository, say) if _has_weights(repository) else None
    from dynrun.hub.pull import pull

    say(f"{repository.name} has a {variant.label} GGUF, which is taken; `dynrun convert` would make one of safetensors")
    return pull(variant.files, repository.revision, say=say).files[0].path


def missing_files(model: str) -> list[RemoteFile]:
    """What :func:`reference_source` would fetch: nothing where all is here, or where there is no network."""
    from dynrun.hub.cache import is_here

    if (name := _whole_repository(model)) is None:
        return []
    try:
        repository, variant = _found(name)
    except NetworkError:
        return []
    files: Sequence[RemoteFile] = ()
    if variant is not None:
        files = variant.files
    elif _has_weights(repository):
        files = conversion_files(repository)
    return [file for file in files if not is_here(file)]


def _whole_repository(model: str) -> HubName | None:
    """The repository that ``model`` names, if it is one and no quant of it."""
    from dynrun.hub.resolve import parse_name

    if "/" not in model or Path(model).expanduser().exists() or Path(model).is_absolute() or model.startswith("."):
        return None
    name = parse_name(model)
    return None if name.quant else name


def _found(name: HubName) -> tuple[Repository, Variant | None]:
    """The repository, and its GGUF of full precision where it has one."""
    from dynrun.hub.repository import fetch_repository
    from dynrun.hub.variants import shelve

    repository = fetch_repository(name.repository, name.revision)
    whole = [one for one in shelve(repository.files).quants if one.label in FULL_PRECISION and not one.missing]
    # The best of them: BF16 is what most models are released in.
    return repository, min(whole, key=lambda one: ("BF16", "F16", "F32").index(one.label), default=None)


def _has_weights(repository: Repository) -> bool:
    return any(file.path.endswith(".safetensors") for file in repository.files)


def _snapshot_here(repository: str) -> Path | None:
    """The newest snapshot in the cache that a conversion can read."""
    from dynrun.hub.cache import repository_folder

    snapshots = sorted((repository_folder(repository) / "snapshots").glob("*/"), key=lambda path: path.stat().st_mtime)
    return next((path for path in reversed(snapshots) if any(path.glob("*.safetensors"))), None)


def fetch_folder(model: str, say: Say) -> Path:
    """Repository ``model`` (``owner/repo[@revision]``) in the Hub's cache, as much of it as a conversion reads."""
    from dynrun.hub.repository import fetch_repository
    from dynrun.hub.resolve import parse_name

    name = parse_name(model)
    return _pull_folder(fetch_repository(name.repository, name.revision), say)


def _pull_folder(repository: Repository, say: Say) -> Path:
    from dynrun.hub.pull import pull

    files = conversion_files(repository)
    say(f"fetching {len(files)} files of {repository.name}, {sum(file.size for file in files) / 1e9:.2f} GB")
    return pull(files, repository.revision, say=say).files[0].path.parent


def conversion_files(repository: Repository) -> list[RemoteFile]:
    """What of ``repository`` a conversion reads. Raises NotFoundError where it has no safetensors."""
    wanted = set(wanted_of([file.path for file in repository.files]))
    files = [file for file in repository.files if file.path in wanted]
    if not any(file.path.endswith(".safetensors") for file in files):
        raise NotFoundError(f"{repository.name} has no safetensors", fix="name a repository that has some, or a GGUF")
    return files
