"""How long the app takes from the command to its first screen, and how long a slider's step takes: medians.

    .venv/bin/python benchmarks/tui.py [--runs 10]

The first is measured in a pseudo-terminal of 80 × 24, warm (one run before): from the start of the process until the
footer has been written, which is the last of a screen. The second calls what the Plan room calls, for DeepSeek-V3.
"""

from __future__ import annotations

import argparse
import os
import pty
import select
import signal
import statistics
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# The palette stands at the footer's end.
FOOTER = b"Palette"
LONGEST_S = 60.0


def first_screen_s(argv: Sequence[str]) -> tuple[float, float]:
    """Seconds until the footer stands on a terminal, and seconds of the processor until then."""
    began = time.perf_counter()
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
        os.execv(argv[0], list(argv))  # noqa: S606
    try:
        _resize(terminal)
        waited = _until(terminal, FOOTER, began)
    finally:
        os.kill(child, signal.SIGKILL)
        _, _, used = os.wait4(child, 0)
        os.close(terminal)
    return waited, used.ru_utime + used.ru_stime


def _resize(terminal: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))


def _until(terminal: int, text: bytes, began: float) -> float:
    seen = b""
    while (left := began + LONGEST_S - time.perf_counter()) > 0:
        if select.select([terminal], [], [], left)[0]:
            seen += os.read(terminal, 1 << 16)
            if text in seen:
                return time.perf_counter() - began
    raise SystemExit(f"no first screen within {LONGEST_S:.0f} s; the terminal got:\n{seen[-2000:]!r}")


def slider_step_s(runs: int) -> float:
    """Seconds of one re-plan of the largest shape that the tests have."""
    from dynrun.runtime.machine import Device, Machine
    from dynrun.runtime.model_facts import facts_of
    from dynrun.tui.planning import Knobs, placement_of
    from tests.shapes import shape_header

    gpu = Device("CUDA0", "a GPU", 24 << 30, 24 << 30, 1000e9)
    machine = Machine("server", (gpu,), 768 << 30, 760 << 30, 300e9, 64)
    facts = facts_of(shape_header("deepseek-v3", "Q4_K"))
    taken = []
    for n in range(runs):
        began = time.perf_counter()
        placement_of(facts, machine, Knobs(n_ctx=8192, n_cpu_moe=len(facts.moe_layers) - n % 3))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    argv = (sys.executable, "-m", "dynrun.cli.app", "tui")
    first_screen_s(argv)
    screens = [first_screen_s(argv) for _ in range(runs)]
    waited, used = (statistics.median(column) for column in zip(*screens, strict=True))
    print(f"first screen  median {waited:.2f} s, of the processor {used:.2f} s, {runs} runs")
    print(f"slider step   median {slider_step_s(runs) * 1e3:.0f} ms, {runs} runs")


if __name__ == "__main__":
    main()
