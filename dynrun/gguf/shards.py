"""Split GGUFs: the names of their files, and the headers of all of them as one.

Takes the path of any one shard, or of a file that is not split; nothing of the weights is read. Names and metadata as
llama_split_path of src/llama.cpp and tools/gguf-split/gguf-split.cpp of llama.cpp have them: all metadata is in the
first shard, ``split.no`` counts from 0, names count from 1.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from dynrun.errors import DynrunError, NotFoundError, UsageError
from dynrun.gguf.header import Header, TensorInfo, read_header

_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
NUMBER, COUNT, TENSORS = SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


def shard_path(prefix: Path, number: int, count: int) -> Path:
    """The name of shard ``number`` (from 1) of ``count``."""
    return prefix.with_name(f"{prefix.name}-{number:05d}-of-{count:05d}.gguf")


def split_name(path: Path) -> str:
    """The name of a GGUF without what says that it is one, or a shard of one."""
    match = _NAME.fullmatch(path.name)
    return match[1] if match else path.name.removesuffix(".gguf")


def read_shards(path: Path) -> tuple[Header, ...]:
    """The headers of all shards in order, of a file that is not split its own.

    Raises what :func:`read_header` raises; UsageError where the file's name does not say which shard it is;
    NotFoundError where a shard is missing; DynrunError where they do not belong together.
    """
    given = read_header(path)
    count = given.metadata.get(COUNT, 1)
    if type(count) is not int or count <= 1:
        return (given,)
    match = _NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise UsageError(
            f"{path} is one of {count} shards, and its name does not say which",
            fix=f"name them as llama.cpp does: model-00001-of-{count:05d}.gguf",
        )
    paths = [shard_path(path.with_name(match[1]), number, count) for number in range(1, count + 1)]
    if missing := [shard for shard in paths if not shard.is_file()]:
        raise NotFoundError(
            f"{missing[0]} does not exist, one of the {count} shards of the model", fix="put all shards into one folder"
        )
    headers = tuple(map(read_header, paths))
    check(headers)
    return headers


def read_whole_header(path: Path) -> Header:
    """The header of a GGUF as if it were not split.

    ``path`` is the first shard's, ``file_bytes`` all shards', and a tensor's ``offset`` that in its own shard. Raises
    what :func:`read_shards` raises.
    """
    return join(read_shards(path))


def join(headers: tuple[Header, ...]) -> Header:
    """All shards' headers, which belong together, as :func:`read_whole_header` gives them."""
    first = headers[0]
    if len(headers) == 1:
        return first
    return replace(
        first,
        metadata={key: value for key, value in first.metadata.items() if key not in SPLIT_KEYS},
        kv_bytes={key: size for key, size in first.kv_bytes.items() if key not in SPLIT_KEYS},
        tensors={name: tensor for header in headers for name, tensor in header.tensors.items()},
        file_bytes=sum(header.file_bytes for header in headers),
    )


def check(headers: tuple[Header, ...]) -> None:
    """Raise DynrunError where the headers are not those of all shards of one model, in order."""
    tensors: dict[str, TensorInfo] = {}
    for index, header in enumerate(headers):
        finding = ""
        said = header.metadata.get(NUMBER), header.metadata.get(COUNT)
        if said != (index, len(headers)):
            finding = f"it says that it is number {said[0]!r:.20} of {said[1]!r:.20}, counted from 0"
        elif twice := tensors.keys() & header.tensors.keys():
            finding = f"it has {min(twice)!r:.80}, which a shard before it has too"
        if finding:
            raise DynrunError(f"{header.path} is no shard of its model: {finding}", fix="download or make them again")
        tensors |= header.tensors
    wanted = headers[0].metadata.get(TENSORS, len(tensors))
    if wanted != len(tensors):
        raise DynrunError(
            f"the shards of {headers[0].path} have {len(tensors)} tensors of {wanted!r:.20}",
            fix="download or make them again",
        )
