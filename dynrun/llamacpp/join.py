"""A model in shards as one file, which all that reads weights in place takes; joined once, by llama-gguf-split."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dynrun.artifacts import file_lock, key_of, translated_os_errors
from dynrun.errors import DoesNotFitError
from dynrun.gguf.shards import read_shards, split_name
from dynrun.llamacpp.tools import merge_shards
from dynrun.paths import models_dir


def joined(path: Path, say: Callable[[str], None]) -> Path:
    """``path`` itself, or where it is one of several shards all of them in one file, in the cache.

    Raises what :func:`dynrun.gguf.shards.read_shards` raises; DoesNotFitError where the disk has no room for a copy.
    """
    headers = read_shards(path)
    if len(headers) == 1:
        return path
    stats = [header.path.resolve().stat() for header in headers]
    key = key_of({"first": str(headers[0].path.resolve()), "files": [(s.st_size, s.st_mtime_ns) for s in stats]})
    whole = models_dir() / "joined" / key[:16] / f"{split_name(path)}.gguf"
    size = sum(header.file_bytes for header in headers)
    with file_lock(whole.parent.with_suffix(".lock"), waiting=f"another program joins {whole.name}; waiting for it"):
        if whole.is_file():
            return whole
        with translated_os_errors(whole):
            whole.parent.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(whole.parent).free) < size:
                raise DoesNotFitError(
                    f"{path.name} and its {len(headers) - 1} other shards need {size / 1e9:.2f} GB to be joined in "
                    f"{whole.parent}, and {free / 1e9:.2f} GB are free",
                    fix="free some space, or set DYNRUN_CACHE to a larger disk",
                )
            say(f"joining the {len(headers)} shards of {whole.name}, {size / 1e9:.2f} GB")
            # The tool writes no file that is there already.
            with tempfile.TemporaryDirectory(dir=whole.parent, prefix=".join-") as folder:
                merge_shards(headers[0].path, Path(folder) / "whole.gguf")
                (Path(folder) / "whole.gguf").replace(whole)
    return whole
