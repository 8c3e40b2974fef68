"""From what the user calls a model to the folder with its safetensors, fetched from the Hub where it is one's name.

Of a repository only what a conversion reads comes here: no code, no pickles, no second copy in another format.
"""

from __future__ import annotations

from pathlib import Path

from dynrun.convert.environment import Say
from dynrun.convert.folder import wanted_of
from dynrun.errors import NotFoundError
from dynrun.hub.files import RemoteFile, Repository


def model_folder(model: str, say: Say) -> Path:
    """The folder that ``model`` names. Raises NotFoundError, and what fetching a repository raises."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists() or path.is_absolute() or model.startswith("."):
        raise NotFoundError(f"{model} is no folder", fix="give a folder with safetensors and config.json")
    return fetch_folder(model, say)


def fetch_folder(model: str, say: Say) -> Path:
    """Repository ``model`` (``owner/repo[@revision]``) in the Hub's cache, as much of it as a conversion reads."""
    from dynrun.hub.pull import pull
    from dynrun.hub.repository import fetch_repository
    from dynrun.hub.resolve import parse_name

    name = parse_name(model)
    repository = fetch_repository(name.repository, name.revision)
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
