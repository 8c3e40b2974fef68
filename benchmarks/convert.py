"""What a conversion takes against what its plan said: bytes on the disk, and the converter's memory, at their peaks.

usage: .venv/bin/python benchmarks/convert.py FOLDER...      (folders of safetensors; each is converted anew)
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from dynrun.convert.environment import conversion_environment
from dynrun.convert.stage import Wishes, convert
from dynrun.paths import cache_dir


def watch(folder: Path, peak: list[int], done: threading.Event) -> None:
    """The most bytes that ``folder`` holds until ``done``; links count nothing."""
    while not done.wait(0.02):
        sizes = []
        for path in folder.rglob("*"):
            try:
                sizes.append(path.lstat().st_size if not path.is_symlink() and path.is_file() else 0)
            except FileNotFoundError:
                continue
        peak[0] = max(peak[0], sum(sizes))


def measure(source: Path) -> str:
    """A row of the table, out of a process of its own: the greatest memory of all its children."""
    conversion_environment(print)
    shared = cache_dir() / "convert"
    with tempfile.TemporaryDirectory(prefix="dynrun-bench-") as home:
        os.environ["DYNRUN_CACHE"] = home
        (Path(home) / "convert").symlink_to(shared)
        peak, done = [0], threading.Event()
        models = Path(home) / "models"
        models.mkdir()
        thread = threading.Thread(target=watch, args=(models, peak, done))
        thread.start()
        started = time.monotonic()
        try:
            converted = convert(source, Wishes(), print)
        finally:
            done.set()
            thread.join()
        elapsed = time.monotonic() - started
        shutil.rmtree(models)
    # Kilobytes, but on macOS.
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    plan = converted.plan
    return (
        f"{source.name:24} {plan.type_name:5} {plan.result_bytes / 1e6:10.1f} {peak[0] / 1e6:10.1f} "
        f"{peak[0] / plan.result_bytes - 1:+7.1%} {plan.memory_bytes / 1e6:10.1f} {memory / 1e6:10.1f} "
        f"{memory / plan.memory_bytes - 1:+7.1%} {elapsed:7.1f}"
    )


def main() -> None:
    print(
        f"{'':24} {'':5} {'disk plan':>10} {'peak, MB':>10} {'':7} {'mem. plan':>10} {'peak, MB':>10} {'':7} {'s':>7}"
    )
    for folder in map(Path, sys.argv[1:]):
        # getrusage keeps the greatest of all children that there were.
        if (child := os.fork()) == 0:
            print(measure(folder.resolve()), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
