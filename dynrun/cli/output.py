"""What all commands print alike: data on stdout, narration on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynrun.allocation.search_stage import SearchStage


def emit(as_json: bool, data: Mapping[str, Any], show: Callable[[], None]) -> None:
    """One JSON object on stdout, or what ``show`` prints."""
    if as_json:
        print(json.dumps(data, ensure_ascii=False, indent=1))
    else:
        show()


def say(text: str) -> None:
    """A line of narration."""
    print(text, file=sys.stderr, flush=True)


class Ticker:
    """Progress of one stage on stderr: a line that changes on a terminal, now and then a line elsewhere."""

    def __init__(self, stage: str, every_s: float = 30.0) -> None:
        import time

        self.stage, self.every_s, self._clock = stage, every_s, time.monotonic
        self._last = self._clock()
        self._live = sys.stderr.isatty()

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """``done`` of ``total``, in any unit."""
        text = f"{self.stage}: {done:,.0f} of {total:,.0f}{f' — {note}' if note else ''}"
        if self._live:
            end = "\n" if done >= total else ""
            print(f"\r\x1b[2K{text[:110]}", end=end, file=sys.stderr, flush=True)
        elif self._clock() - self._last >= self.every_s:
            self._last = self._clock()
            say(text)


class StageReporter:
    """Progress of the stages of `make` on stderr, and its probes in a log file."""

    def __init__(self) -> None:
        from dynrun.llamacpp.process import new_log

        self.path = new_log("make")
        self._ticker = Ticker("")

    def stage(self, name: str, detail: str) -> None:
        """A stage begins (or is found)."""
        say(f"{name}: {detail}")
        self._ticker = Ticker(f"  {name}")

    def progress(self, done: float, total: float, note: str = "") -> None:
        """``done`` of ``total`` in the stage that began last."""
        self._ticker(done, total, note)

    def log(self, line: str) -> None:
        """A line for the log file only."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def megabytes(n: int) -> str:
    """``n`` bytes as people read it."""
    return f"{n / 1e6:,.1f} MB"


def candidates_table(search: SearchStage) -> str:
    """The schemes that were measured, the best first, and how sure the first place is."""
    if not search.trials:
        return "no candidates were measured"
    lines = [f"{'candidate':24} {'measured KLD':>12} {'predicted':>10}"]
    lines += [f"{t['name']:24} {t['kld']:12.4f} {t['predicted_kld']:10.4f}" for t in search.trials]
    if search.ratio is not None and search.ratio_ci95 is not None:
        low, high = search.ratio_ci95
        lines.append(f"the first over the second: {search.ratio:.3f} ({low:.3f}–{high:.3f})")
    return "\n".join(lines)
