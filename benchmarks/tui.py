"""How soon the app answers: from the command to its first screen and to a first token, entering rooms, a slider's step.

    .venv/bin/python benchmarks/tui.py [--runs 10] [--first-token] [--rooms]

In a pseudo-terminal of 80 × 24, warm (one run before). The first screen: from the start of the process until the footer
has been written, which is the last of a screen. The first token: until a chat with `demo`, entered and asked by keys as
soon as they are taken, shows one. Rooms: the longest time that the event loop did not come back while each room was
entered for the first time, and the most of the processor that it used without coming back. The slider's step calls what
the Plan room calls, for DeepSeek-V3.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tui_terminal import python, terminal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
APP = python("-m", "dynrun.cli.app", "tui")
_ROOM_KEYS = {"plan": "\x1bOR", "chat": "\x1bOS", "make": "\x1b[15~", "bench": "\x1b[17~"}
_IN_ROOM_S = 2.0


def first_screen_s() -> tuple[float, float]:
    """Seconds until the footer stands on a terminal, and seconds of the processor until then."""
    with terminal(APP) as shown:
        # The palette stands at the footer's end.
        waited = shown.until("Palette") - shown.began_s
        used = shown.end()
    return waited, used.ru_utime + used.ru_stime


def first_token_s() -> float:
    """Seconds until `demo` says something; the first of the models is it."""
    with terminal(APP) as shown:
        shown.until("demo-moe")
        shown.send("c")
        shown.until("Ask something")
        shown.send("Hi\r")
        return shown.until(r"context [1-9]\d* of") - shown.began_s


def gaps_by_room() -> dict[str, list[dict[str, Any]]]:
    """What benchmarks/tui_watched.py notes of the event loop while each room is entered."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes.json"
        with terminal(python(str(ROOT / "benchmarks" / "tui_watched.py"), str(notes))) as shown:
            shown.until("demo-moe")
            for key in _ROOM_KEYS.values():
                shown.send(key)
                time.sleep(_IN_ROOM_S)
            shown.send("\x11")
            while not notes.is_file():
                time.sleep(0.1)
        gaps = json.loads(notes.read_text(encoding="utf-8"))["gaps"]
    return {mode: [gap for gap in gaps if gap["mode"] == mode] for mode in ("models", *_ROOM_KEYS)}


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


def longest(gaps: Sequence[dict[str, Any]], what: str) -> str:
    """The longest of ``what`` in milliseconds."""
    return f"{max((gap[what] for gap in gaps), default=0.0) * 1e3:4.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--first-token", action="store_true", help="with `demo`, made first where it is not there")
    parser.add_argument("--rooms", action="store_true")
    options = parser.parse_args()
    runs = options.runs
    print(f"load          {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    first_screen_s()
    waited, used = (statistics.median(column) for column in zip(*(first_screen_s() for _ in range(runs)), strict=True))
    print(f"first screen  median {waited:.2f} s, of the processor {used:.2f} s, {runs} runs")
    if options.first_token:
        first_token_s()
        print(f"first token   median {statistics.median(first_token_s() for _ in range(runs)):.2f} s, {runs} runs")
    if options.rooms:
        for mode, gaps in gaps_by_room().items():
            print(f"enter {mode:7} longest gap {longest(gaps, 'wall_s')}, of the processor {longest(gaps, 'cpu_s')}")
    print(f"slider step   median {slider_step_s(runs) * 1e3:.0f} ms, {runs} runs")


if __name__ == "__main__":
    main()
