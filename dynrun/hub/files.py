"""Files of a model on the Hub, as all of this room passes them on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RemoteFile:
    """One file at one commit.

    ``path`` lies in the repository; ``size`` is in bytes. ``etag`` names the blob in the cache: the SHA-256 of a file
    in LFS, which is ``sha256`` then too, else git's SHA-1 of it. ``xet_hash`` is empty where it is not in Xet.
    """

    repository: str
    commit: str
    path: str
    size: int
    etag: str
    sha256: str = ""
    xet_hash: str = ""

    @property
    def name(self) -> str:
        """Without folders."""
        return self.path.rpartition("/")[2]

    @property
    def url(self) -> str:
        """Where it is fetched; it redirects to the storage."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repository, self.path, revision=self.commit)


@dataclass(frozen=True)
class Repository:
    """A model repository at one commit. ``revision`` is the branch or tag that was asked for, or the commit itself."""

    name: str
    commit: str
    revision: str
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True)
class Variant:
    """What a user calls one file of a repository: one quantization, in one file or all its shards in order.

    ``label`` is its quant (``Q4_K_M``, ``UD-IQ2_XXS``), or the file's name where that has none. ``missing`` are the
    numbers of shards that the repository lacks, the first of them where it lacks many.
    """

    label: str
    files: tuple[RemoteFile, ...]
    missing: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(file.size for file in self.files)

    @property
    def first(self) -> RemoteFile:
        """The file that llama.cpp is given: it finds the other shards itself."""
        return self.files[0]


@dataclass(frozen=True)
class Shelf:
    """All that a repository has for llama.cpp: the model's quants, and what goes beside them.

    ``companions``: by kind (``mmproj``, ``mtp`` and other drafts, ``imatrix``) the variants of each.
    """

    quants: tuple[Variant, ...]
    companions: Mapping[str, tuple[Variant, ...]] = field(default_factory=dict)


def amount(n: int) -> str:
    """``n`` bytes as people read it."""
    return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"
