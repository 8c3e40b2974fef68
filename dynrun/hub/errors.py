"""What goes wrong between here and the Hub, said for people: missing or closed is exit code 4, the network 3.

Takes errors of huggingface_hub, gives ours. No message carries a token, a signed address or credentials of a proxy.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dynrun.artifacts import translated_os_errors
from dynrun.errors import MALFORMED, DynrunError, NetworkError, NotFoundError, UsageError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

MODEL, DATA_SET = "model", "data set"
# Between scheme and host, after the question mark of an address, and what looks like a token of the Hub.
_SECRETS = ((r"//[^/\s@]+@", "//"), (r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1"), (r"\bhf_\w+", "hf_…"))


class RefusedError(NotFoundError):
    """The Hub has it, or might, and does not give it to this token."""


class GatedError(RefusedError):
    """The Hub has it for those whom its owner lets in."""


@contextmanager
def errors_for_people(repository: str, kind: str = MODEL) -> Iterator[None]:
    """Errors of huggingface_hub as ours; ``kind`` is what ``repository`` is.

    Raises UsageError for a name that is none, RefusedError, NotFoundError, NetworkError; a full disk and the like as
    :func:`dynrun.artifacts.translated_os_errors` has them.
    """
    from huggingface_hub import constants, errors

    try:
        with translated_os_errors(Path(constants.HF_HUB_CACHE)):
            yield
    except errors.HFValidationError as error:
        raise UsageError(f"{repository!r} names no {kind}", fix="write owner/name") from error
    except errors.HfHubHTTPError as error:
        raise refusal(
            repository, error.response.status_code, error.response.headers.get("X-Error-Code", ""), error, kind=kind
        ) from error
    except network_errors() as error:
        raise NetworkError(
            f"the {kind} {repository} could not be fetched: {reason(error)}",
            fix="check the network, HF_ENDPOINT and HF_HUB_OFFLINE, and try again",
        ) from error
    # The library believes what it is told: an answer of another shape ends in one of these.
    except MALFORMED as error:
        raise NetworkError(
            f"what the server says of the {kind} {repository} makes no sense: {reason(error)}",
            fix="check HF_ENDPOINT, and try again later",
        ) from error


def refusal(
    repository: str, status: int, code: str = "", error: HfHubHTTPError | None = None, *, kind: str = MODEL
) -> DynrunError:
    """What ``status`` of the server, with the code of its ``X-Error-Code`` header, means."""
    if code == "GatedRepo":
        fix = f"ask for access at {page(repository, kind)}; {token_note()}"
        return GatedError(f"the {kind} {repository} is gated", fix=fix)
    if code in ("EntryNotFound", "RevisionNotFound"):
        what = "file" if code == "EntryNotFound" else "revision"
        return NotFoundError(f"the {kind} {repository} has no such {what}", fix=f"see {page(repository, kind)}")
    # The library knows 401 as a missing repository on the Hub itself, and not on a mirror of it.
    if status in (401, 403, 404):
        message = f"there is no {kind} {repository} on the Hub, or it is private"
        return RefusedError(message, fix=f"check the name; {token_note()}")
    said = reason(error) if error else f"the server answers {status}"
    return NetworkError(f"the {kind} {repository} could not be fetched: {said}", fix="try again later")


def network_errors() -> tuple[type[Exception], ...]:
    """What the library raises where the network, not the answer, is at fault."""
    from huggingface_hub import errors

    # The first base is HTTPError of whichever HTTP client the library has; OSError and ConnectionError are there too.
    return (*errors.HfHubHTTPError.__bases__, json.JSONDecodeError)


def reason(error: BaseException) -> str:
    """The first cause in one line, without secrets: the library wraps it in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return scrubbed(" ".join(str(error).split()))[:160] or type(error).__name__


def scrubbed(text: str) -> str:
    """``text`` without tokens, credentials in addresses, and the signatures of addresses."""
    for pattern, replacement in _SECRETS:
        text = re.sub(pattern, replacement, text)
    return text


def page(repository: str, kind: str = MODEL) -> str:
    """Where people read about ``repository``."""
    from huggingface_hub import constants

    prefix = "datasets/" if kind == DATA_SET else ""
    return scrubbed(f"{constants.ENDPOINT}/{prefix}{repository}")


def token_note() -> str:
    """Which token is sent, never the token itself, and what to do about it."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return "no token is sent, as HF_HUB_DISABLE_IMPLICIT_TOKEN is set"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            return f"the token in {name} is sent, and is not enough"
    if get_token():
        return f"the token in {constants.HF_TOKEN_PATH} is sent, and is not enough"
    return "no token is set: set HF_TOKEN, or run `hf auth login`"
