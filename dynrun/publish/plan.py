"""What a push would publish: the files of a folder, the card, and what speaks against it.

Takes a folder that `make` wrote (GGUFs, schemes, imatrix, a report), gives a :class:`PushPlan`; sends nothing. The card
is the report's, with the licence and the base model that the Hub asks for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrun.artifacts import sha256_bytes, sha256_file
from dynrun.errors import MALFORMED, NotFoundError, UsageError
from dynrun.gguf.header import read_header
from dynrun.gguf.shards import COUNT, read_shards
from dynrun.report.folder import CARD, DATA, PAGE, PLOTS

_SCHEME = ".scheme.toml"
_REPORT = ".report"
# Tokens of the Hub; whoever finds one in a public file has it.
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class PlannedFile:
    """``name`` is its path in the repository; ``content`` where it is not the file's own."""

    name: str
    path: Path
    size_bytes: int
    sha256: str
    content: bytes | None = None


@dataclass(frozen=True)
class PushPlan:
    """``front_matter``: the card's, as it will be; ``notes``: what its reader will miss."""

    folder: Path
    repository: str
    files: tuple[PlannedFile, ...]
    front_matter: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def card(self) -> str:
        """The model card."""
        return next(file.content or b"" for file in self.files if file.name == CARD).decode()

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def plan_push(folder: Path, repository: str, *, license: str = "", base_model: str = "") -> PushPlan:  # noqa: A002
    """What pushing ``folder`` to ``repository`` (owner/name) would publish.

    Raises UsageError where the folder has no GGUF or no report, where the report is of other files, where nobody says
    the licence, or where a file holds a token; what reading a GGUF raises where one is not whole.
    """
    if not _REPOSITORY.fullmatch(repository) or ".." in repository:
        raise UsageError(f"{repository!r} names no repository", fix="write owner/name")
    if not folder.is_dir():
        raise NotFoundError(f"{folder} is no folder", fix="give the folder that make --out wrote to")
    models = _models(folder)
    report = _report_of(folder)
    known = _hashes(report)
    files = [_planned(path.name, path) for path in (*models, *sorted(folder.glob(f"*{_SCHEME}")))]
    for file in files:
        if known.get(file.name, file.sha256) != file.sha256:
            raise UsageError(
                f"{report / DATA} is of another {file.name}: its numbers would not be true", fix="make it again"
            )
    card, front_matter = _card(report / CARD, license, base_model)
    data = card.encode()
    files.append(PlannedFile(CARD, report / CARD, len(data), sha256_bytes(data), data))
    files += [_planned(name, report / name) for name in (PAGE, DATA) if (report / name).is_file()]
    files += [_planned(f"{PLOTS}/{path.name}", path) for path in sorted((report / PLOTS).glob("*.*"))]
    _check_secrets(files)
    return PushPlan(folder, repository, tuple(files), front_matter, tuple(_notes(folder, models, known, front_matter)))


def _models(folder: Path) -> list[Path]:
    """The GGUFs of ``folder``, every one whole."""
    found = sorted(folder.glob("*.gguf"))
    for path in found:
        if read_header(path).metadata.get(COUNT, 1) != 1:
            read_shards(path)
    if not any(_is_model(path) for path in found):
        raise UsageError(f"{folder} holds no GGUF of a model", fix="give the folder that make --out wrote to")
    return found


def _is_model(path: Path) -> bool:
    header = read_header(path)
    # Shards after the first have no architecture.
    return header.metadata.get("general.type", "model") == "model" and bool(header.architecture or header.tensors)


def _report_of(folder: Path) -> Path:
    """The folder of the report: itself, or the only one in it."""
    if (folder / DATA).is_file():
        return folder
    found = [path.parent for path in folder.glob(f"*{_REPORT}/{DATA}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"{folder} has {len(found)} reports and none of all files",
            fix="make them with one command: dynrun make MODEL --quant A,B --out FOLDER",
        )
    raise UsageError(f"{folder} has no report", fix="make the files with dynrun make --out, or compare --report")


def _hashes(report: Path) -> dict[str, str]:
    """File name → SHA-256, as the report says."""
    try:
        rows = json.loads((report / DATA).read_text(encoding="utf-8"))["report"]["files"]
        return {str(row["file"]): str(row["sha256"]) for row in rows if row["sha256"]}
    except MALFORMED as error:
        raise UsageError(f"{report / DATA} is no report of this dynrun", fix="make it again") from error


def _planned(name: str, path: Path) -> PlannedFile:
    return PlannedFile(name, path, path.stat().st_size, sha256_file(path))


def _card(path: Path, license_id: str, base_model: str) -> tuple[str, dict[str, Any]]:
    """The card with what the user says of licence and base model, and its front matter."""
    from huggingface_hub import RepoCard

    try:
        card = RepoCard(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no model card: {str(error)[:120]}", fix="make the report again") from error
    data: Any = card.data
    if license_id:
        data.license = license_id
    if base_model:
        if not _REPOSITORY.fullmatch(base_model):
            raise UsageError(f"{base_model!r} names no repository", fix="write owner/name")
        data.base_model, data.base_model_relation = base_model, "quantized"
    front_matter: dict[str, Any] = data.to_dict()
    if not front_matter.get("license"):
        raise UsageError(
            f"{path} says no licence, and the model's metadata has none",
            fix="look it up at the original model and give --license ID, as apache-2.0, mit, gemma, other",
        )
    return str(card), front_matter


def _check_secrets(files: list[PlannedFile]) -> None:
    for file in files:
        if file.name.endswith(".gguf") or file.name.endswith(".png"):
            continue
        text = (file.content or file.path.read_bytes()).decode("utf-8", "replace")
        if _SECRET.search(text):
            raise UsageError(f"{file.path} holds a token of the Hub; nothing was sent", fix="remove it, and revoke it")


def _notes(
    folder: Path, models: list[Path], known: Mapping[str, str], front_matter: Mapping[str, Any]
) -> Iterator[str]:
    if not front_matter.get("base_model"):
        yield "the card names no base model; give --base-model owner/name"
    if not any("imatrix" in path.name for path in models):
        yield f"no imatrix is in {folder}; others cannot make the same files"
    kinds = [path.name for path in models if _is_model(path) and path.name not in known and "-of-" not in path.name]
    if kinds:
        yield f"the report has no numbers of {', '.join(kinds)}"
