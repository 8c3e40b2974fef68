"""Publish a plan: large files one after the other, then one commit of all; proved by what the Hub lists afterwards.

Run again after a kill it goes on: what the storage has is not sent twice, and nothing is visible before the commit.
Takes a :class:`PushPlan`; the token is huggingface_hub's to find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynrun import __version__
from dynrun.errors import DynrunError, NetworkError, NotFoundError, UsageError
from dynrun.hub.errors import network_errors, page, reason, scrubbed, token_note
from dynrun.hub.repository import fetch_repository
from dynrun.publish.plan import PlannedFile, PushPlan

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

# Smaller files go with the commit itself.
_LARGE_BYTES = 1 << 20


@dataclass(frozen=True)
class Pushed:
    """``commit``: the repository's newest; ``url``: where people read about it."""

    url: str
    commit: str
    files: tuple[PlannedFile, ...]


def push(plan: PushPlan, say: Callable[[str], None], *, private: bool = False, message: str = "") -> Pushed:
    """Create the repository where it is missing, send the files, commit, look whether they are there.

    Raises NotFoundError where the token may not write, NetworkError where the network fails, DynrunError where the Hub
    has other files afterwards than were sent.
    """
    from huggingface_hub import HfApi, RepoCard
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    with _errors_for_people(plan.repository):
        # Before anything is sent: the commit at the end would be refused with it.
        RepoCard(plan.card).validate(repo_type="model")
        say(f"repository {plan.repository}{' (private)' if private else ''}")
        api.create_repo(plan.repository, private=private or None, exist_ok=True)
        operations = list(_sent(api, plan, say))
        say("commit")
        info = api.create_commit(
            plan.repository,
            operations,
            commit_message=message or _message(plan),
            commit_description=f"Made and measured by dynrun {__version__}.",
        )
    _prove(plan)
    return Pushed(page(plan.repository), str(info.oid), plan.files)


def _sent(api: HfApi, plan: PushPlan, say: Callable[[str], None]) -> Iterator[CommitOperationAdd]:
    from huggingface_hub import CommitOperationAdd

    done = 0
    for file in plan.files:
        source = file.content if file.content is not None else str(file.path)
        operation = CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=source)
        if file.size_bytes >= _LARGE_BYTES:
            say(f"{file.name}: {file.size_bytes:,} bytes, {done:,} of {plan.size_bytes:,} done")
            api.preupload_lfs_files(plan.repository, [operation], free_memory=False)
        done += file.size_bytes
        yield operation


def _message(plan: PushPlan) -> str:
    names = [file.name for file in plan.files if file.name.endswith(".gguf")]
    return f"Upload {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _prove(plan: PushPlan) -> None:
    """Compare what the Hub lists with what was sent."""
    there = {file.path: file for file in fetch_repository(plan.repository).files}
    for file in plan.files:
        listed = there.get(file.name)
        if listed is None or listed.size != file.size_bytes or (listed.sha256 and listed.sha256 != file.sha256):
            raise DynrunError(
                f"{plan.repository} has another {file.name} than was sent", fix="run the same command again"
            )


@contextmanager
def _errors_for_people(repository: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        raise _refusal(repository, error) from error
    except RuntimeError as error:
        # The library wraps what happens to one file.
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _refusal(repository, error.__cause__) from error
        raise _broken(repository, error) from error
    except network_errors() as error:
        raise _broken(repository, error) from error
    except ValueError as error:
        raise UsageError(f"the Hub refuses the card of {repository}: {scrubbed(str(error))[:200]}") from error


def _broken(repository: str, error: Exception) -> NetworkError:
    fix = "check the network and run the same command again: it goes on"
    return NetworkError(f"{repository} could not be sent: {reason(error)}", fix=fix)


def _refusal(repository: str, error: HfHubHTTPError) -> DynrunError:
    status = error.response.status_code
    if status in (401, 403, 404):
        return NotFoundError(f"the Hub does not let {repository} be written ({status})", fix=token_note())
    said = f"{status}: {reason(error)}"
    return NetworkError(f"{repository} could not be sent: {said}", fix="run the same command again: it goes on")
