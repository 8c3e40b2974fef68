"""Run a command while a random process below it stands still now and then: tests that race with what they watch fail.

    .venv/bin/python benchmarks/pauses.py --seed 2 .venv/bin/python -m pytest -m "native or tui or e2e" -n 4

Pauses are SIGSTOP and SIGCONT, up to ``--longest`` seconds and mostly much shorter, two to twenty a second.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil

_BETWEEN_S = (0.05, 0.5)


def pause(process: psutil.Process, seconds: float) -> None:
    """It may end meanwhile."""
    with suppress(psutil.Error):
        process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        process.send_signal(signal.SIGCONT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=2.5, metavar="SECONDS")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    chance = random.Random(options.seed)  # noqa: S311
    command = subprocess.Popen(options.command)
    top = psutil.Process(command.pid)
    pauses: list[threading.Thread] = []
    while command.poll() is None:
        time.sleep(chance.uniform(*_BETWEEN_S))
        with suppress(psutil.Error):
            if below := top.children(recursive=True):
                # Short ones above all: of a second or two only what nobody waits for survives.
                seconds = options.longest * chance.random() ** 2
                pauses.append(threading.Thread(target=pause, args=(chance.choice(below), seconds)))
                pauses[-1].start()
    for one in pauses:
        one.join()
    sys.exit(command.returncode)


if __name__ == "__main__":
    main()
