"""Compile the pinned llama.cpp once per machine, and find what was compiled.

Takes the unpacked source, gives ``builds/<fingerprint>/bin`` in the user's cache with every program and shared
library, relocatable; any clone with the same fingerprint reuses it. Standard library only: build.py imports this.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from dynrun.artifacts import discard, file_lock, key_of, translated_os_errors, write_json
from dynrun.errors import MALFORMED, DoesNotFitError, DynrunError
from dynrun.llamacpp.backends import TOOLKIT_FOLDERS, Choice
from dynrun.llamacpp.process import ToolError, capture, new_log, scrubbed_environment, stream
from dynrun.llamacpp.source import Pin
from dynrun.paths import builds_dir

PROGRAMS = (
    *("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-bench", "llama-server", "llama-cli"),
    *("llama-completion", "llama-gguf-split", "llama-fit-params", "ggml-rpc-server"),
)
LIBRARIES = ("llama",)
NEEDED_BYTES = 2_500_000_000
RECORD = "dynrun-llama-cpp.json"
_MANIFEST = "build.json"
_BACKEND_FLAGS = {
    "cpu": (),
    "cuda": ("-DGGML_CUDA=ON",),
    "metal": (),
    "vulkan": ("-DGGML_VULKAN=ON",),
    "hip": ("-DGGML_HIP=ON",),
}
_COMPILER_FIX = {
    "darwin": "install the command line tools: xcode-select --install",
    "win32": "install the Visual Studio Build Tools with C++",
}
Report = Callable[[str, bool], None]


@dataclass(frozen=True)
class Installation:
    """A compiled llama.cpp: ``bin`` holds its programs and shared libraries."""

    bin: Path
    fingerprint: str
    backend: str
    commit: str

    def program(self, name: str) -> Path:
        """The path of a program. Raises DynrunError where it is missing."""
        path = self.bin / (f"{name}.exe" if sys.platform == "win32" else name)
        if not path.is_file():
            raise DynrunError(f"{path} is missing", fix="run python3 build.py")
        return path


@cache
def installation() -> Installation:
    """The build that this environment was set up with. Raises DynrunError where there is none."""
    record = Path(sys.prefix) / RECORD
    try:
        data = json.loads(record.read_text(encoding="utf-8"))
        found = Installation(Path(data["bin"]), data["fingerprint"], data["backend"], data["commit"])
    except (OSError, *MALFORMED) as error:
        raise DynrunError("llama.cpp has not been built for this environment", fix="run python3 build.py") from error
    if not found.bin.is_dir():
        raise DynrunError(f"the compiled llama.cpp is gone from {found.bin}", fix="run python3 build.py")
    return found


def record_installation(prefix: Path, installed: Installation) -> None:
    """Have the environment at ``prefix`` use ``installed``."""
    write_json(prefix / RECORD, {**asdict(installed), "bin": str(installed.bin)})


@dataclass(frozen=True)
class Compiler:
    """The C++ compiler: its path and first line of ``--version``."""

    path: str
    version: str


def find_compiler() -> Compiler:
    """The C++ compiler that CMake will take. Raises DynrunError with the fix for this platform."""
    fix = _COMPILER_FIX.get(sys.platform, "install one: apt install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora)")
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"):
        path = shutil.which(name) if name else None
        if path is None:
            continue
        done = capture([path, "--version"], check=False)
        if done.exit_code == 0 or name == "cl":
            return Compiler(path, (done.stdout.splitlines() or [name])[0])
    raise DynrunError("no C++ compiler was found", fix=fix)


def cpu_features() -> str:
    """What a native build depends on: the CPU's feature flags where the system tells them."""
    if flags := cpu_flags():
        return hashlib.sha256(" ".join(sorted(flags)).encode()).hexdigest()[:16]
    if sys.platform == "darwin":
        return capture(["sysctl", "-n", "machdep.cpu.brand_string"], check=False).stdout.strip()
    return platform.processor()


def cpu_flags() -> list[str]:
    """The CPU's feature flags as Linux names them; none elsewhere."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", info.read_text(), re.M) if info.is_file() else None
    return match[1].split() if match else []


def cmake_flags(choice: Choice, pin: Pin) -> tuple[str, ...]:
    """CMake's arguments for a build of ``choice``."""
    origin = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
    flags: tuple[str, ...] = (
        *("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_RPC=ON", "-DGGML_CCACHE=OFF"),
        *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF"),
        # Left on, the build downloads the web UI and, with OpenSSL, depends on the system's.
        *("-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF"),
        *(f"-DCMAKE_INSTALL_RPATH={origin}", "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON"),
        # Otherwise the version is read from whatever git repository the source lies in.
        *(f"-DLLAMA_BUILD_COMMIT={pin.llama_cpp_commit}", "-DLLAMA_BUILD_NUMBER=0"),
        *_BACKEND_FLAGS[choice.backend],
    )
    if choice.backend != "metal" and sys.platform == "darwin":
        flags += ("-DGGML_METAL=OFF",)
    if choice.architecture:
        name = {"cuda": "CMAKE_CUDA_ARCHITECTURES", "hip": "GPU_TARGETS"}.get(choice.backend)
        flags += (f"-D{name}={choice.architecture}",) if name else ()
    if "amx_tile" in cpu_flags():
        # Tried with GCC 12.2: quantized weights end in SIGILL or SIGSEGV in ggml_backend_amx_mul_mat (ggml-cpu/amx).
        without = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
        flags += (f"-DCMAKE_C_FLAGS={without}", f"-DCMAKE_CXX_FLAGS={without}")
    return flags


def compile_llama_cpp(
    pin: Pin,
    source: Path,
    choice: Choice,
    *,
    tools: Path,
    jobs: int,
    report: Report,
    verbose: bool = False,
    programs: tuple[str, ...] = PROGRAMS,
    libraries: tuple[str, ...] = LIBRARIES,
) -> Installation:
    """The build of ``source`` for ``choice``, compiled if the cache has none; ``tools`` holds cmake and ninja.

    ``programs`` and ``libraries`` are the CMake targets. An interrupted build goes on where it stopped. Raises
    DynrunError with the log's path where it fails.
    """
    flags, targets = cmake_flags(choice, pin), (*programs, *libraries)
    facts: dict[str, object] = {"source": pin.sha256, "flags": flags, "targets": targets}
    facts |= {"compiler": find_compiler().version, "cpu": cpu_features()}
    fingerprint = key_of(facts)
    folder = builds_dir() / fingerprint
    installed = Installation(folder / "bin", fingerprint, choice.backend, pin.llama_cpp_commit)
    waiting = "another build of the same llama.cpp is running; waiting for it"
    with file_lock(builds_dir() / f"{fingerprint}.lock", waiting=waiting):
        if _is_whole(folder, programs):
            report(f"llama.cpp ({choice.backend}): compiled already, {folder}", True)
            return installed
        _check_disk(folder)
        work = folder / "work"
        log = new_log("compile")
        _configure(source, work, flags, tools, log, report)
        _ninja(work, targets, tools, jobs, log, report, verbose)
        _publish(work, folder, facts)
    return installed


def discard_builds() -> None:
    """Remove every compiled build, waiting for those that are being made."""
    for folder in sorted(builds_dir().glob("*/")):
        with file_lock(folder.with_suffix(".lock"), waiting=f"{folder} is being compiled; waiting for it"):
            discard(folder, _MANIFEST)


def _is_whole(folder: Path, programs: tuple[str, ...]) -> bool:
    return (folder / _MANIFEST).is_file() and all((folder / "bin" / _exe(name)).is_file() for name in programs)


def _exe(name: str) -> str:
    return f"{name}.exe" if sys.platform == "win32" else name


def _check_disk(folder: Path) -> None:
    with translated_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise DoesNotFitError(
            f"the build needs {NEEDED_BYTES / 1e9:.1f} GB in {folder} and {free / 1e9:.1f} GB are free",
            fix="free some space, or set DYNRUN_CACHE to another disk",
        )


def _configure(source: Path, work: Path, flags: tuple[str, ...], tools: Path, log: Path, report: Report) -> None:
    made = work / "CMakeCache.txt"
    # CMake refuses a folder that another clone's source was configured in.
    if made.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={source}\n" not in made.read_text(errors="replace"):
        report("an unfinished build of another clone is in the way: starting anew", True)
        shutil.rmtree(work)
    report("configuring llama.cpp", False)
    ninja = f"-DCMAKE_MAKE_PROGRAM={tools / _exe('ninja')}"
    argv: list[str | Path] = [tools / _exe("cmake"), "-S", source, "-B", work, "-G", "Ninja", ninja, *flags]
    try:
        capture(argv, log=log, env=_build_environment(tools))
    except ToolError as error:
        raise _failure("configuring", error, log) from error


def _ninja(
    work: Path, targets: tuple[str, ...], tools: Path, jobs: int, log: Path, report: Report, verbose: bool
) -> None:
    started = time.monotonic()

    def show(line: str) -> None:
        match = re.match(r"\[(\d+)/(\d+)\] (.*)", line)
        if verbose:
            report(line.rstrip(), True)
        elif match:
            elapsed = int(time.monotonic() - started)
            step = f"compiling llama.cpp: step {match[1]} of {match[2]}, {elapsed // 60}:{elapsed % 60:02d}, log {log}"
            report(step, False)

    argv: list[str | Path] = [tools / _exe("ninja"), "-C", work, "-j", str(jobs), *targets]
    try:
        stream(argv, show, log=log, env=_build_environment(tools))
    except ToolError as error:
        raise _failure("compiling", error, log) from error


def _build_environment(tools: Path) -> dict[str, str]:
    folders = (tools, os.environ.get("PATH"), *TOOLKIT_FOLDERS)
    path = os.pathsep.join(str(folder) for folder in folders if folder)
    return scrubbed_environment({"PATH": path, "NINJA_STATUS": "[%f/%t] "})


def _failure(what: str, error: ToolError, log: Path) -> DynrunError:
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    if "No space left on device" in text:
        message = f"the disk became full while {what} llama.cpp"
        return DoesNotFitError(message, fix="free some space, run it again", log=log)
    # What compilers, linkers, nvcc and CMake (whose reason is on the next line) write; flags and file names have none.
    match = re.search(r"^CMake Error.*:\s*\n\s*(\S.*)$|^(.*(?:\berror( \w+)?: |nvcc fatal|\bKilled\b).*)$", text, re.M)
    reason = (match[1] or match[2]).strip()[:200] if match else str(error.message)
    return DynrunError(f"{what} llama.cpp failed: {reason}", fix="read the log; --clean starts anew", log=log)


def _publish(work: Path, folder: Path, facts: dict[str, object]) -> None:
    """Keep what is needed to run, then declare it whole, then drop the gigabyte of object files."""
    target = folder / "bin"
    with translated_os_errors(target):
        shutil.rmtree(target, ignore_errors=True)
        partial = folder / "bin.part"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for entry in sorted((work / "bin").iterdir()):
            if entry.is_symlink():
                (partial / entry.name).symlink_to(entry.readlink())
            elif entry.is_file():
                shutil.copy2(entry, partial / entry.name)
        partial.rename(target)
        write_json(folder / _MANIFEST, facts)
        shutil.rmtree(work, ignore_errors=True)
