"""`dynrun doctor`: what is installed, what is missing, and how to mend it.

Every check runs what it speaks of, in a process of its own where that could crash; none of them stops the others.
"""

from __future__ import annotations

import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from dynrun.cli.output import emit
from dynrun.errors import DynrunError
from dynrun.llamacpp.build import PROGRAMS, Installation, installation
from dynrun.llamacpp.process import capture, exit_reason, scrubbed_environment
from dynrun.paths import cache_dir

_BUILD = "run python3 build.py"
_MODULES = ("gguf", "httpx2", "huggingface_hub", "jinja2", "llama_cpp", "numpy", "psutil", "rich", "scipy", "torch")
# The demo's reference, quants and results take about 1.2 GB; its sweep keeps the model and its logits in memory.
_DISK_BYTES = 2_000_000_000
_MEMORY_BYTES = 2_000_000_000
_LIBRARIES = (
    "from dynrun.llamacpp.library import ggml, llama; ggml(); print(llama().llama_print_system_info().decode())"
)
_TORCH = "import torch; print(torch.__version__, 'with CUDA' if torch.cuda.is_available() else 'on the CPU')"


@dataclass(frozen=True)
class Check:
    """A finding: ``fix`` is empty where ``ok``."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False) -> None:
    """Check the installation, the devices and the room there is; ends with exit code 1 where something is missing.

    Example: dynrun doctor
    """
    checks = [check() for check in (_python, _packages, _build, _programs, _libraries, _torch, _disk, _memory)]
    devices, listing = _devices()
    checks.append(listing)
    ok = all(check.ok for check in checks)
    data = {
        "ok": ok,
        "checks": [asdict(check) for check in checks],
        "llama_cpp": _llama_cpp(),
        "devices": devices,
    }
    emit(as_json, data, lambda: _show(checks))
    if not ok:
        raise typer.Exit(1)


def _show(checks: list[Check]) -> None:
    for check in checks:
        print(f"{'ok ' if check.ok else 'BAD'}  {check.name:<10} {check.detail}")
        if check.fix:
            print(f"{'':16}→ {check.fix}")


def _llama_cpp() -> dict[str, str | None]:
    try:
        return {"commit": installation().commit, "backend": installation().backend}
    except DynrunError:
        return {"commit": None, "backend": None}


def _installed(name: str, look: Callable[[Installation], Check]) -> Check:
    try:
        return look(installation())
    except DynrunError as error:
        return Check(name, False, error.message, error.fix or _BUILD)


def _python() -> Check:
    detail = f"{platform.python_version()} in {sys.prefix}"
    if sys.prefix == sys.base_prefix:
        return Check("python", False, f"{detail}, no environment of dynrun", f"{_BUILD}, then use .venv/bin/dynrun")
    return Check("python", True, detail)


def _packages() -> Check:
    missing = [name for name in _MODULES if find_spec(name) is None]
    if missing:
        return Check("packages", False, f"missing: {', '.join(missing)}", _BUILD)
    return Check("packages", True, f"{len(_MODULES)} packages are there")


def _build() -> Check:
    def look(found: Installation) -> Check:
        return Check("llama.cpp", True, f"{found.commit} for {found.backend}, in {found.bin}")

    return _installed("llama.cpp", look)


def _programs() -> Check:
    def look(found: Installation) -> Check:
        broken = [f"{name}: {fault}" for name in PROGRAMS if (fault := _fault(found, name))]
        if broken:
            return Check("programs", False, "; ".join(broken), "run python3 build.py --clean")
        return Check("programs", True, f"all {len(PROGRAMS)} start")

    return _installed("programs", look)


def _fault(found: Installation, name: str) -> str:
    """Why a program does not start; empty where it does."""
    try:
        done = capture((found.program(name), "--version"), env=scrubbed_environment(), check=False)
    except DynrunError as error:
        return error.message
    text = done.stdout + "".join(done.stderr_tail)
    # llama-quantize and ggml-rpc-server know no --version and answer with their usage, which proves as much.
    if re.search(r"^(version|usage): ", text, re.IGNORECASE | re.MULTILINE):
        return ""
    return (text.strip().splitlines() or [exit_reason(done.exit_code)])[-1][:200]


def _libraries() -> Check:
    return _in_python("libraries", _LIBRARIES, "run python3 build.py --clean")


def _torch() -> Check:
    return _in_python("torch", _TORCH, _BUILD)


def _in_python(name: str, code: str, fix: str) -> Check:
    done = capture((sys.executable, "-c", code), check=False)
    lines = (done.stdout if done.exit_code == 0 else "".join(done.stderr_tail)).strip().splitlines()
    last = lines[-1][:300] if lines else exit_reason(done.exit_code)
    return Check(name, done.exit_code == 0, last, "" if done.exit_code == 0 else fix)


def _disk() -> Check:
    cache = cache_dir()
    there = next(folder for folder in (cache, *cache.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    detail = f"{free / 1e9:,.1f} GB free for {cache}"
    if free < _DISK_BYTES:
        return Check("disk", False, detail, f"free {_DISK_BYTES / 1e9:.0f} GB, or set DYNRUN_CACHE to another disk")
    return Check("disk", True, detail)


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    detail = f"{memory.available / 1e9:,.1f} GB of {memory.total / 1e9:,.1f} GB free"
    if memory.available < _MEMORY_BYTES:
        return Check("memory", False, detail, "close other programs; larger models need more than the demo")
    return Check("memory", True, detail)


def _devices() -> tuple[list[dict[str, Any]], Check]:
    """The GPUs that llama.cpp sees, then the CPU."""
    from dynrun.llamacpp import tools

    processor = _processor()
    try:
        listed = [_gpu(line) for line in tools.devices()]
    except DynrunError as error:
        return [processor], Check("devices", False, error.message, error.fix or _BUILD)
    found = [*listed, processor]
    return found, Check("devices", True, "; ".join(f"{device['name']}: {device['description']}" for device in found))


def _gpu(line: str) -> dict[str, Any]:
    """A line of llama-server --list-devices."""
    from dynrun.runtime.this_machine import parse_device

    name, description, total, free = parse_device(line) or (line.split(":")[0], line, None, None)
    return {"name": name, "kind": "gpu", "description": description, "memory_bytes": total, "free_bytes": free}


def _processor() -> dict[str, Any]:
    import psutil

    from dynrun.config import available_cores

    memory = psutil.virtual_memory()
    name = platform.processor() or platform.machine()
    return {
        "name": "CPU",
        "kind": "cpu",
        "description": f"{name}, {available_cores()} cores, {memory.total / 1e9:,.1f} GB",
        "cores": available_cores(),
        "memory_bytes": memory.total,
        "free_bytes": memory.available,
    }
