"""GGUF headers of files that are not downloaded, by ranges: a few megabytes of files of any size.

Takes a :class:`Variant`, gives the header of all its shards as one. Keeps nothing.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from dynrun.errors import NotFoundError
from dynrun.gguf.header import Header, parse_header
from dynrun.gguf.shards import check, join
from dynrun.hub.files import RemoteFile, Variant
from dynrun.hub.ranges import RangeReader

_AT_ONCE = 8


def read_remote_header(variant: Variant) -> Header:
    """The header of a variant on the Hub, as ``read_whole_header`` gives it of one here.

    ``path`` is that of its first file in the repository. Raises NotFoundError where shards are missing, DynrunError
    for what is no GGUF, NetworkError and RefusedError as RangeReader does.
    """
    if variant.missing:
        numbers = ", ".join(map(str, variant.missing))
        raise NotFoundError(f"{variant.label} lacks the shards {numbers}", fix="choose another quant or repository")
    with ThreadPoolExecutor(min(_AT_ONCE, len(variant.files))) as pool:
        headers = tuple(pool.map(_read, variant.files))
    check(headers)
    return join(headers)


def _read(file: RemoteFile) -> Header:
    with closing(RangeReader(file)) as reader:
        return parse_header(Path(file.path), reader, file.size)
