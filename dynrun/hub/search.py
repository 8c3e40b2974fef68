"""What the Hub finds of GGUFs for a few words: for lists that people choose from, the most downloaded first."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from dynrun.hub.errors import errors_for_people
from dynrun.hub.repository import is_name


@dataclass(frozen=True)
class Hit:
    """A repository with GGUFs. ``gated``: its owner lets in whom they want. ``modified``: None where it is not said."""

    name: str
    downloads: int
    likes: int
    gated: bool
    modified: datetime | None


def search(words: str, *, limit: int = 40) -> list[Hit]:
    """Repositories that the Hub's search finds for ``words``. Raises NetworkError, NotFoundError."""
    from huggingface_hub import HfApi

    with errors_for_people(words):
        found = HfApi().list_models(
            search=words,
            filter="gguf",
            sort="downloads",
            limit=limit,
            expand=["downloads", "likes", "gated", "lastModified"],
        )
        return [
            Hit(model.id, int(model.downloads or 0), int(model.likes or 0), bool(model.gated), model.last_modified)
            # What a server calls a repository is shown on the terminal.
            for model in found
            if is_name(model.id)
        ]
