"""How fast `dynrun pull` is beside curl, on one file served on this machine.

usage: .venv/bin/python -m benchmarks.pull [--bytes 1000000000] [--rounds 5] [--folder DIR]

Each round runs curl, curl with sha256sum after it, and `dynrun pull` (whole processes), one after another, from the
same server (another process, sendfile) onto the same disk; what was fetched is removed after each. dynrun checks the
hash and has the bytes on the disk (fsync) before it says that it is done; curl does neither. Rates are medians; the
ratio is of the times within a round. CPU seconds are the processes' own: they tell also where the machine is busy with
other things. The peak memory of pull is given for the file and for a tenth of it. Prints one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

_REPOSITORY = "o/big-GGUF"
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Run:
    """``cpu_s`` of all cores, in the kernel too; ``peak_bytes`` is the most memory that the process had."""

    elapsed_s: float
    cpu_s: float
    peak_bytes: int


def serve(folder: Path) -> None:
    """Serve the files of ``folder`` as a repository each, until standard input ends."""
    from tests.hub_server import Hub, digest, serving

    hub = Hub(models={f"{_REPOSITORY}-{path.stem}": {path.name: path} for path in sorted(folder.glob("*.gguf"))})
    for files in hub.models.values():
        # The server hashes a file when it is first asked for: not in anybody's time.
        list(map(digest, files.values()))
    with serving(hub):
        print(hub.url, flush=True)
        sys.stdin.read()


def run(argv: list[str], env: dict[str, str]) -> Run:
    """A process to its end. Raises CalledProcessError."""
    started = time.monotonic()
    process = subprocess.Popen(argv, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    elapsed_s = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, argv)
    # macOS counts bytes, Linux kilobytes.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(elapsed_s, usage.ru_utime + usage.ru_stime, peak)


def curl(url: str, name: str, out: Path, *, checked: bool) -> Run:
    """curl follows the redirect to the storage, as everybody does."""
    address = f"{url}/{_REPOSITORY}-{name}/resolve/main/{name}.gguf"
    command = f"curl -sSfL -o {out} {address}" + (f" && sha256sum {out}" if checked else "")
    found = run(["sh", "-c", command], {})
    out.unlink()
    return found


def pull(url: str, name: str, home: Path) -> Run:
    """`dynrun pull` into an empty cache."""
    env = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "DYNRUN_CACHE": str(home / "dynrun")}
    found = run([sys.executable, "-m", "dynrun.cli.app", "pull", f"{_REPOSITORY}-{name}", "--json"], env)
    shutil.rmtree(home)
    return found


def write_noise(path: Path, n: int) -> None:
    """``n`` bytes that nothing can compress."""
    with path.open("wb") as stream:
        for at in range(0, n, _CHUNK):
            stream.write(os.urandom(min(_CHUNK, n - at)))


def measure(folder: Path, n_bytes: int, rounds: int) -> dict[str, object]:
    """All rounds."""
    served = folder / "served"
    served.mkdir()
    write_noise(served / "whole.gguf", n_bytes)
    write_noise(served / "tenth.gguf", n_bytes // 10)
    argv = [sys.executable, "-m", "benchmarks.pull", "--serve", str(served)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        small = pull(url, "tenth", folder / "home")
        rows = []
        for _ in range(rounds):
            plain = curl(url, "whole", folder / "curl", checked=False)
            checked = curl(url, "whole", folder / "curl", checked=True)
            rows.append((plain, checked, pull(url, "whole", folder / "home")))
        server.stdin.close()
    columns = list(zip(*rows, strict=True))
    names = ("curl", "curl and sha256sum", "dynrun pull")
    return {
        "bytes": n_bytes,
        "mb_per_s": {
            name: round(n_bytes / 1e6 / statistics.median(one.elapsed_s for one in column))
            for name, column in zip(names, columns, strict=True)
        },
        "cpu_s": {
            name: round(statistics.median(one.cpu_s for one in column), 2)
            for name, column in zip(names, columns, strict=True)
        },
        "pull_over_curl": [round(plain.elapsed_s / pulled.elapsed_s, 3) for plain, _, pulled in rows],
        "peak_mb": {"tenth": small.peak_bytes // 10**6, "whole": max(one.peak_bytes for one in columns[2]) // 10**6},
        "machine": {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)},
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=10**9)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--serve", type=Path)
    wanted = parser.parse_args()
    if wanted.serve:
        serve(wanted.serve)
        return
    with tempfile.TemporaryDirectory(dir=wanted.folder) as folder:
        print(json.dumps(measure(Path(folder), wanted.bytes, wanted.rounds), indent=1))


if __name__ == "__main__":
    main()
