"""The native tests on llama.cpp's libraries with AddressSanitizer and UndefinedBehaviorSanitizer. Linux, gcc.

usage: .venv/bin/python -m benchmarks.sanitized DIR [--jobs 2] [pytest's arguments; default: -m native tests/native]

Compiles the libraries of the pinned source into DIR/build (goes on where it was interrupted), lays them over a copy of
the programs of this environment, whose own code is not sanitized then but what they call is, and runs pytest in an
environment DIR/venv with the packages of this one; .venv stays as it is. Reports go to DIR/reports, a file a process,
and are counted by where they stem from, as JSON on standard output. Undefined behaviour is written down and goes on,
what AddressSanitizer finds ends its process. Ends with the exit code of pytest, or 1 where there are reports.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import site
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from dynrun.llamacpp.backends import Choice
from dynrun.llamacpp.build import LIBRARIES, cmake_flags, installation, record_installation
from dynrun.llamacpp.source import read_pin

ROOT = Path(__file__).resolve().parent.parent
# Of llama.cpp's own switches LLAMA_SANITIZE_* reach the programs alone, GGML_SANITIZE_* ggml, none libllama. Without
# NDEBUG it would be another program than the one that ships; -O1 and few symbols, as it compiles for long.
_FLAGS = "-O1 -g1 -DNDEBUG -fno-omit-frame-pointer -fsanitize=address,undefined"
_FINDING = re.compile(r"(\S+:\d+:\d+): runtime error: (.*)|ERROR: AddressSanitizer: (\S+)|SUMMARY: (\S+: .*)")


def compiled(out: Path, jobs: int) -> Path:
    """The folder of the sanitized libraries, and of the programs."""
    kept = [flag for flag in cmake_flags(Choice("cpu", "sanitized"), read_pin()) if "CMAKE_BUILD_TYPE" not in flag]
    flags = [*kept, "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
    flags += [f"-DCMAKE_{language}_FLAGS_RELWITHDEBINFO={_FLAGS}" for language in ("C", "CXX")]
    tools, source, folder = Path(sys.prefix) / "bin", ROOT / "vendor" / "llama.cpp", out / "build"
    make = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"]
    subprocess.run([tools / "cmake", "-S", source, "-B", folder, *make, *flags], check=True, stdout=sys.stderr)
    subprocess.run([tools / "ninja", "-C", folder, "-j", str(jobs), *LIBRARIES], check=True, stdout=sys.stderr)
    whole = out / "bin"
    whole.mkdir(exist_ok=True)
    for made in (*installation().bin.iterdir(), *(folder / "bin").glob("lib*")):
        (whole / made.name).unlink(missing_ok=True)
        shutil.copy2(made, whole / made.name, follow_symlinks=False)
    for name in ("libggml-base.so", "libggml-cpu.so", "libllama.so"):
        if b"__asan_init" not in (whole / name).read_bytes():
            sys.exit(f"{whole / name} is not sanitized")
    return whole


def environment(out: Path, programs: Path) -> Path:
    """The Python of an environment with this one's packages, whose llama.cpp is the one in ``programs``."""
    folder = out / "venv"
    if not (folder / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # As a site folder, so that its own .pth files count too.
    lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages())
    (packages / "shared.pth").write_text(lines)
    record_installation(folder, replace(installation(), bin=programs, fingerprint="sanitized"))
    return folder / "bin" / "python"


def preloaded() -> str:
    """The sanitizers before all else, and the library whose exceptions they intercept."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip() for name in names]
    return ":".join(str(Path(path).resolve()) for path in found)


def tested(python: Path, reports: Path, arguments: list[str]) -> int:
    """pytest's exit code."""
    log = f"log_path={reports}/report"
    extra = {
        "LD_PRELOAD": preloaded(),
        # Python itself keeps memory to its end.
        "ASAN_OPTIONS": f"detect_leaks=0:{log}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:{log}",
        "PYTHONPATH": str(ROOT),
        "PYTHONMALLOC": "malloc",
    }
    reports.mkdir(parents=True, exist_ok=True)
    argv = [python, "-m", "pytest", *(arguments or ["-m", "native", "tests/native"])]
    return subprocess.run(argv, cwd=ROOT, env={**os.environ, **extra}, check=False).returncode


def found(reports: Path) -> Counter[str]:
    """How often each place was reported."""
    places: Counter[str] = Counter()
    for report in reports.glob("report.*"):
        for match in _FINDING.finditer(report.read_text(errors="replace")):
            places[" ".join(part for part in match.groups() if part)] += 1
    return places


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    options, arguments = parser.parse_known_args()
    out: Path = options.out.resolve()
    python = environment(out, compiled(out, options.jobs))
    code = tested(python, out / "reports", arguments)
    places = found(out / "reports")
    print(json.dumps({"pytest": code, "reports": dict(places.most_common())}, indent=1))
    return code or bool(places)


if __name__ == "__main__":
    sys.exit(main())
