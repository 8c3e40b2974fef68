"""From what the user calls a model to a repository with GGUFs.

``owner/repo``, with ``@revision`` and ``:QUANT`` or ``:FILE``; an address of the Hub; a part of a name. A repository
without GGUFs stands for its ``-GGUF`` sibling.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from urllib.parse import unquote, urlsplit

from dynrun.errors import NotFoundError, UsageError
from dynrun.hub.errors import GatedError, RefusedError, errors_for_people
from dynrun.hub.files import Repository, Shelf
from dynrun.hub.repository import MAIN, fetch_repository, is_name
from dynrun.hub.variants import shelve

# Whose GGUFs of other people's models are known to be whole and kept up, in the order they are looked at.
QUANTIZERS = ("unsloth", "ggml-org", "bartowski", "lmstudio-community", "mradermacher")
_NAME = re.compile(
    r"(?P<repository>(?:[\w.-]+/)?[\w.-]+)(?:@(?P<revision>[^:@]+))?(?::(?P<quant>[^:]+))?", re.ASCII | re.DOTALL
)
_MOST_FOUND = 20

# Asks which of several names is meant; raises UsageError where there is nobody to ask.
Ask = Callable[[str, Sequence[str]], str]


@dataclass(frozen=True)
class HubName:
    """``quant`` is a label or a file of the repository, empty where none is named."""

    repository: str
    revision: str = MAIN
    quant: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision == MAIN else f"@{self.revision}"
        return f"{self.repository}{revision}{f':{self.quant}' if self.quant else ''}"


@dataclass(frozen=True)
class Found:
    """``note`` says how the repository was found where it is not the one that was named."""

    name: HubName
    repository: Repository
    shelf: Shelf
    note: str = ""


def parse_name(text: str, quant: str = "") -> HubName:
    """What ``text`` names, with the quant of the option. Raises UsageError for what can be no name."""
    address = re.match(r"(?:hf://|https?://|hf\.co/|huggingface\.co/)", text)
    if address:
        name = _parse_address(text)
    elif (match := _NAME.fullmatch(text)) and ".." not in match["repository"]:
        name = HubName(match["repository"], match["revision"] or MAIN, match["quant"] or "")
    else:
        raise UsageError(f"{text!r} names no model", fix="write owner/repo, owner/repo:QUANT, or an address of the Hub")
    if quant and name.quant and quant.upper() != name.quant.upper():
        raise UsageError(f"{text} and --quant {quant} ask for two quants", fix="give one of them")
    return replace(name, quant=quant or name.quant)


def _parse_address(text: str) -> HubName:
    """``hf://owner/repo[:QUANT]``, or what the browser shows of a repository, a folder or a file of it."""
    from huggingface_hub import constants

    split = urlsplit(text if "://" in text else f"https://{text}")
    hosts = {"huggingface.co", "hf.co", "www.huggingface.co", urlsplit(constants.ENDPOINT).netloc}
    path = f"{split.netloc}{split.path}" if split.scheme == "hf" else split.path
    parts = [unquote(part) for part in path.split("/") if part]
    if (split.scheme != "hf" and split.netloc not in hosts) or len(parts) < 2 or parts[0] in ("datasets", "spaces"):
        raise UsageError(
            f"{text!r} is no address of a model on the Hub", fix=f"such as {constants.ENDPOINT}/owner/repo"
        )
    name = parse_name("/".join(parts[:2]))
    if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve"):
        # A folder's address names the repository: which quant is in it, its files say.
        file = "/".join(parts[4:]) if parts[2] != "tree" else ""
        return replace(name, revision=parts[3], quant=file)
    return name


def find(name: HubName, ask: Ask) -> Found:
    """The repository with GGUFs that ``name`` means: itself, a sibling, or what the Hub's search finds.

    One match is taken, several go to ``ask``. Raises NotFoundError, RefusedError where it is gated, NetworkError.
    """
    missing = NotFoundError(f"the Hub finds no GGUF of {name.repository}", fix="check the name")
    why = f"there is no {name.repository}"
    if "/" in name.repository:
        try:
            repository = fetch_repository(name.repository, name.revision)
        except GatedError:
            raise
        except RefusedError as error:
            missing = error
        else:
            if (shelf := shelve(repository.files)).quants:
                return Found(name, repository, shelf)
            why = f"{name.repository} has no GGUF"
            missing = NotFoundError(why, fix="name a repository that has some")
    for candidates in _candidates(name.repository):
        if candidates:
            return _chosen(name, candidates, ask, why)
    raise missing


def _candidates(asked: str) -> Iterator[list[str]]:
    """Repositories that may be meant, one kind after the other: same owner, known quantizers, search."""
    owner, _, name = asked.rpartition("/")
    if owner and not name.upper().endswith("-GGUF"):
        yield [sibling for sibling in (f"{asked}-GGUF",) if _has_gguf(sibling)]
        others = [f"{quantizer}/{name}-GGUF" for quantizer in QUANTIZERS if quantizer != owner]
        yield [sibling for sibling in (*others, f"bartowski/{owner}_{name}-GGUF") if _has_gguf(sibling)]
    yield _search(name, owner)


def _has_gguf(name: str) -> bool:
    from huggingface_hub import HfApi

    try:
        with errors_for_people(name):
            info = HfApi().model_info(name, timeout=30.0)
    except NotFoundError:
        return False
    return any(file.rfilename.endswith(".gguf") for file in info.siblings or ())


def _search(name: str, owner: str) -> list[str]:
    from huggingface_hub import HfApi

    with errors_for_people(f"{owner}/{name}" if owner else name):
        models = HfApi().list_models(
            search=name, author=owner or None, filter="gguf", sort="downloads", limit=_MOST_FOUND
        )
        # What a server calls a repository is shown on the terminal.
        return [model.id for model in models if is_name(model.id)]


def _chosen(name: HubName, candidates: list[str], ask: Ask, why: str) -> Found:
    taken = candidates[0] if len(candidates) == 1 else ask(f"{why}; which of these is meant?", candidates)
    repository = fetch_repository(taken)
    renamed = replace(name, repository=repository.name, revision=MAIN)
    return Found(renamed, repository, shelve(repository.files), f"{why}; taking {taken}")
