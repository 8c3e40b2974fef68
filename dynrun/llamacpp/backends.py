"""Which backend this machine has a *device* for, and what is missing to build it. Standard library only."""

from __future__ import annotations

import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dynrun.errors import DynrunError
from dynrun.llamacpp.process import capture

Backend = Literal["cpu", "cuda", "metal", "vulkan", "hip"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
# Where toolkits lie that are not on the PATH; the build puts them there.
TOOLKIT_FOLDERS = (Path("/usr/local/cuda/bin"), Path("/opt/rocm/bin"))


@dataclass(frozen=True)
class Choice:
    """A backend, why it was chosen, and the GPU architecture it is built for (empty: all, or none)."""

    backend: Backend
    reason: str
    architecture: str = ""


@dataclass(frozen=True)
class _Found:
    device: str
    architecture: str = ""


def choose_backend(wanted: str) -> Choice:
    """The backend for ``wanted`` (``auto`` or a name). Raises DynrunError where a named one cannot be built here."""
    if wanted != "auto":
        return _named(wanted)
    notes = []
    for backend in ("cuda", "hip", "metal", "vulkan"):
        found = _DETECTORS[backend]()
        if found is None:
            continue
        missing = missing_toolkit(backend)
        if not missing:
            return Choice(backend, f"found {found.device}", found.architecture)
        notes.append(f"{found.device} is here, but {missing}")
    return Choice("cpu", "; ".join(notes) or "no GPU device found")


def _named(wanted: str) -> Choice:
    backend = next((name for name in BACKENDS if name == wanted), None)
    if backend is None:
        raise DynrunError(f"no backend {wanted!r}", fix=f"choose one of auto, {', '.join(BACKENDS)}")
    if backend == "cpu":
        return Choice("cpu", "asked for")
    if missing := missing_toolkit(backend):
        raise DynrunError(
            f"the {backend} backend cannot be built here: {missing}", fix="install it, or use --backend cpu"
        )
    found = _DETECTORS[backend]()
    return Choice(backend, "asked for", found.architecture if found else "")


def missing_toolkit(backend: str) -> str:
    """What the build of ``backend`` lacks on this machine, in words; empty where nothing is missing."""
    if backend == "cuda":
        return "" if _has("nvcc") else "nvcc (CUDA toolkit) is not"
    if backend == "hip":
        return "" if _has("hipcc") else "hipcc (ROCm) is not"
    if backend == "metal":
        return "" if sys.platform == "darwin" else "Metal is macOS only"
    if backend == "vulkan":
        return "" if shutil.which("glslc") else "glslc (Vulkan SDK) is not"
    return ""


def _has(program: str) -> bool:
    return bool(shutil.which(program)) or any((folder / program).exists() for folder in TOOLKIT_FOLDERS)


def _output(*argv: str) -> str:
    if shutil.which(argv[0]) is None:
        return ""
    done = capture(argv, check=False)
    return done.stdout if done.exit_code == 0 else ""


def _cuda() -> _Found | None:
    # "NVIDIA GeForce RTX 4090, 8.9"; without a device it may say so in words and still exit with 0.
    output = _output("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader")
    match = re.search(r"^(.+),\s*(\d+)\.(\d+)\s*$", output, re.M)
    return _Found(match[1].strip(), match[2] + match[3]) if match else None


def _hip() -> _Found | None:
    if not Path("/dev/kfd").exists():
        return None
    match = re.search(r"gfx[0-9a-f]+", _output("rocminfo"))
    return _Found("an AMD GPU", match[0]) if match else None


def _metal() -> _Found | None:
    return _Found("Apple silicon") if sys.platform == "darwin" and platform.machine() == "arm64" else None


def _vulkan() -> _Found | None:
    names = re.findall(r"deviceName\s*=\s*(.+)", _output("vulkaninfo", "--summary"))
    # llvmpipe is Mesa's software device: slower than ggml's own CPU backend.
    return next((_Found(name.strip()) for name in names if "llvmpipe" not in name), None)


_DETECTORS: dict[str, Callable[[], _Found | None]] = {"cuda": _cuda, "hip": _hip, "metal": _metal, "vulkan": _vulkan}
