"""What reads strangers' bytes: each target takes a file of them and may end in an error for people, in nothing else.

Used by the unit tests with fixed seeds, and by benchmarks/fuzz.py with coverage to guide it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

from dynrun.calibration.files import read_file
from dynrun.calibration.imatrix import load_imatrix
from dynrun.errors import DynrunError
from dynrun.gguf.header import Header, read_header
from dynrun.gguf.quant_label import label_of
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.shards import read_whole_header
from dynrun.hub.files import RemoteFile, Variant
from dynrun.hub.headers import HeaderReader
from dynrun.hub.ranges import RangeReader
from dynrun.scheme import parse, render, sha256
from dynrun.scheme_gguf import scheme_of
from tests import fuzz_cache, fuzz_convert, fuzz_wire
from tests.memory_ranges import Ranges

Target = Callable[[Path], object]


def _header(path: Path) -> object:
    header = read_header(path)
    return label_of(header), header.bpw, quantizable(header), header.n_elements


def _scheme_from_gguf(path: Path) -> object:
    return render(scheme_of(read_whole_header(path)))


def _remote_header(path: Path) -> tuple[Header, int]:
    """As of a repository's second file: what it has in common with the first is not read again."""
    size = path.stat().st_size
    file = RemoteFile("owner/name", "0" * 40, "model.gguf", size, "0" * 40)
    read = HeaderReader(lambda _: cast("RangeReader", Ranges(path.read_bytes())))
    first = read(Variant("Q4_K_M", (file,)))
    second = read(Variant("Q4_K_M", (file,)))
    assert (second.tensors, second.data_offset) == (first.tensors, first.data_offset)
    return first, read.fetched_bytes


def _scheme(path: Path) -> object:
    text = path.read_bytes().decode("utf-8", "replace")
    scheme = parse(text, where="fuzzed.toml")
    # What was read can be written, and reads as the same.
    again = parse(render(scheme), where="fuzzed.toml") if not scheme.rules else scheme
    assert sha256(again) == sha256(scheme)
    return scheme


# By name: the target, and how the file that it takes is called.
TARGETS: dict[str, tuple[Target, str]] = {
    "header": (_header, "model.gguf"),
    "remote-header": (_remote_header, "model.gguf"),
    "shards": (read_whole_header, "model-00001-of-00002.gguf"),
    "scheme-from-gguf": (_scheme_from_gguf, "model.gguf"),
    "scheme": (_scheme, "scheme.toml"),
    "imatrix": (load_imatrix, "imatrix.gguf"),
    "imatrix-legacy": (load_imatrix, "imatrix.dat"),
    "calibration-jsonl": (lambda path: read_file(path, name="fuzzed"), "chats.jsonl"),
    "calibration-json": (lambda path: read_file(path, name="fuzzed"), "chats.json"),
    "calibration-text": (lambda path: read_file(path, name="fuzzed"), "text.txt.gz"),
    "calibration-parquet": (lambda path: read_file(path, name="fuzzed"), "chats.parquet"),
    **fuzz_cache.TARGETS,
    **fuzz_convert.TARGETS,
    **fuzz_wire.TARGETS,
}
# They have an answer to everything.
NEVER_REFUSE = frozenset({"health", "served", "server-log", "hub-waits"})


def tried(name: str, data: bytes, folder: Path) -> bool:
    """Give ``data`` to a target; whether it took them. Raises what is no error for people, or has several lines."""
    target, file = TARGETS[name]
    path = folder / file
    path.write_bytes(data)
    said = None
    try:
        target(path)
    except DynrunError as error:
        said = str(error)
    assert said is None or 0 < len(said) < 2000, "an error that says nothing, or as long as the file"
    unexpected = [one.name for one in folder.iterdir() if one.name != file]
    assert not unexpected, f"it wrote {unexpected}"
    return said is None


def seeds(name: str, folder: Path) -> list[bytes]:
    """Good files for a target, to begin with."""
    from tests.fuzz_seeds import SEEDS

    found: list[bytes] = SEEDS[name](folder)
    assert found
    return found


def json_lines(*records: object) -> bytes:
    """Records as JSON Lines."""
    return "".join(f"{json.dumps(record)}\n" for record in records).encode()
