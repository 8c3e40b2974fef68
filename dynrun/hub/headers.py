"""GGUF headers of files that are not downloaded, by ranges: a few megabytes of a repository with any number of quants.

Takes a :class:`Variant`, gives the header of all its shards as one. Keeps the first header of a repository in memory:
the others have its metadata, which are most of it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dynrun.errors import NotFoundError
from dynrun.gguf.header import Header, Read, parse_header, parse_sibling
from dynrun.gguf.shards import check, join
from dynrun.hub.files import RemoteFile, Variant
from dynrun.hub.ranges import RangeReader

_AT_ONCE = 8


class HeaderReader:
    """Reads headers of one repository; ``fetched_bytes`` counts."""

    def __init__(self, open_file: Callable[[RemoteFile], RangeReader] = RangeReader) -> None:
        self.fetched_bytes = 0
        self._open = open_file
        self._donors: list[Header] = []

    def __call__(self, variant: Variant) -> Header:
        """The header of a variant, as ``read_whole_header`` gives it of one here.

        ``path`` is that of its first file in the repository. Raises NotFoundError where shards are missing,
        DynrunError for what is no GGUF, NetworkError and RefusedError as RangeReader does.
        """
        if variant.missing:
            numbers = ", ".join(map(str, variant.missing))
            raise NotFoundError(f"{variant.label} lacks the shards {numbers}", fix="choose another quant or repository")
        with ThreadPoolExecutor(min(_AT_ONCE, len(variant.files))) as pool:
            headers = tuple(pool.map(self.of_file, variant.files))
        if len(headers) > 1:
            check(headers)
        return join(headers)

    def of_file(self, file: RemoteFile) -> Header:
        """The header of one file, a shard for instance."""
        with self._open(file) as reader:
            header = self._parse(Path(file.path), reader, file.size)
            self.fetched_bytes += reader.fetched_bytes
        return header

    def _parse(self, path: Path, read: Read, size: int) -> Header:
        for donor in self._donors:
            if (header := parse_sibling(path, read, size, donor)) is not None:
                return header
        header = parse_header(path, read, size)
        self._donors.append(header)
        return header
