"""A long answer in the app below a long conversation: what is lost, how soon a key shows, what the loop does, memory.

    .venv/bin/python benchmarks/tui_chat.py [--tokens 9000] [--rate 150] [--above 20000] [--kind prose|code|thoughts]

The app runs on a pseudo-terminal of 120 × 40, as a user's does; the engine is a scripted one that sends ``--tokens`` of
the kind of text at ``--rate`` a second. Letters are typed into the composer all the while: the latency is from the
write to the terminal until the letter is drawn. Everything is in a folder of its own; nothing of the user's is read.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tui_terminal import Terminal, python, terminal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dynrun.runtime.history import Message, list_chats, new_chat  # noqa: E402
from tests.tiny import write_tiny_llama  # noqa: E402
from tests.tui.scripted_server import Piece, Scripted, scripted_server  # noqa: E402

# No text of an answer has these.
LETTERS = "αβγδεζηθικλμνξοπρστυφχψω"
_WORDS = ("the", "model", "reads", "every", "token", "and", "writes", "another", "one", "below", "it", "until", "told")
_CTRL_U, _CTRL_L, _CTRL_Q = "\x15", "\x0c", "\x11"
_KEY_S, _SAMPLE_S, _SETTLE_S = 0.25, 5.0, 2.0
_LAST = "That was all."


@dataclass
class Run:
    """What is measured while the answer comes."""

    latencies: list[float] = field(default_factory=list)
    rss: list[tuple[float, int]] = field(default_factory=list)
    began_s: float = 0.0
    spent_s: float = 0.0


def prose(n: int, seed: int = 0) -> Iterator[str]:
    """Tokens of paragraphs, headings, lists and short code, as answers are."""
    rng, count = random.Random(seed), 0  # noqa: S311
    while count < n:
        begin = rng.choice(["", "", "", "## ", "- ", "1. ", "> ", "```python\n"])
        words = [
            rng.choice(_WORDS) for _ in range(rng.randint(4, 10) if begin.startswith("#") else rng.randint(20, 90))
        ]
        end = "\n```\n\n" if begin.startswith("`") else ".\n\n"
        for token in [begin, *(f"{word} " for word in words), end]:
            if token:
                count += 1
                yield token


def code(n: int) -> Iterator[str]:
    """Tokens of one block of code, as long as the answer."""
    yield "```python\n"
    for line in range(n // 10):
        yield from (f"def f{line}", "(", "x", ":", " int", ") ->", " int:", "\n    return", f" x + {line}", "\n\n")
    yield "```\n"


KINDS = {
    "prose": lambda n: list(prose(n)),
    "code": lambda n: list(code(n)),
    "thoughts": lambda n: [("reasoning_content", token) for token in prose(n)] + ["done"],
}


class Pace:
    """Called before each piece: so many a second."""

    def __init__(self, rate: float) -> None:
        self._rate, self._n, self._began = rate, 0, 0.0

    def __call__(self) -> None:
        self._began = self._began or time.perf_counter()
        time.sleep(max(self._began + self._n / self._rate - time.perf_counter(), 0))
        self._n += 1


def write_history(model: Path, n_tokens: int) -> None:
    """A conversation of ten questions and answers with so many tokens."""
    chat = new_chat(str(model))
    for turn in range(10):
        answer = "".join(prose(n_tokens // 10, seed=turn + 1)) + _LAST
        chat = chat.said(Message("user", f"Question {turn}?"), Message("assistant", answer))


def typed(shown: Terminal, run: Run, ended: threading.Event) -> None:
    """Type letter after letter until the answer has ended; how long each took to show."""
    rng = random.Random(1)  # noqa: S311
    while not ended.is_set():
        for letter in LETTERS:
            mark, began = shown.mark, time.perf_counter()
            shown.send(letter)
            run.latencies.append(shown.until(letter, mark) - began)
            if ended.wait(_KEY_S * rng.uniform(0.5, 1.5)):
                return
        shown.send(_CTRL_U)
        ended.wait(_KEY_S)


def sampled(pid: int, run: Run, ended: threading.Event) -> None:
    """The app's memory every so often."""
    process = psutil.Process(pid)
    while True:
        run.rss.append((time.perf_counter() - run.began_s, process.memory_info().rss))
        if ended.wait(_SAMPLE_S):
            return


def answered(shown: Terminal, run: Run, messages: int) -> None:
    """Ask; measure until the answer is kept."""
    ended = threading.Event()
    run.began_s = time.perf_counter()
    shown.send("go\r")
    watchers = [
        threading.Thread(target=typed, args=(shown, run, ended)),
        threading.Thread(target=sampled, args=(shown.pid, run, ended)),
    ]
    for watcher in watchers:
        watcher.start()
    while len(list_chats()[0].messages) < messages:
        time.sleep(0.2)
    ended.set()
    for watcher in watchers:
        watcher.join()
    run.spent_s = time.perf_counter() - run.began_s


def open_history(shown: Terminal) -> None:
    """By the list of conversations, which is closed again."""
    shown.send(_CTRL_L)
    shown.until("Question 0")
    # The search hands over to the list, the list opens what is first in it.
    mark = shown.mark
    for _ in range(2):
        shown.send("\r")
        time.sleep(_SETTLE_S)
    shown.until(_LAST, mark)
    shown.send(_CTRL_L)
    time.sleep(_SETTLE_S)


def measure(model: Path, notes: Path, script: Scripted, n_above: int) -> Run:
    """The app from its start to Ctrl+Q."""
    run, argv = Run(), python(str(ROOT / "benchmarks" / "tui_watched.py"), str(notes), str(model))
    write_history(model, n_above)
    with scripted_server(model, script, n_ctx=65536), terminal(argv, size=(120, 40)) as shown:
        shown.until("of 64k")
        open_history(shown)
        answered(shown, run, 22)
        # What the end laid out once more.
        time.sleep(2)
        shown.send(_CTRL_Q)
        while not notes.is_file():
            time.sleep(0.1)
    return run


def report(run: Run, notes: dict[str, Any], pieces: Sequence[Piece]) -> str:
    """In lines for people."""
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    thought = "".join(str(piece[1]) for piece in pieces if isinstance(piece, tuple))
    kept = list_chats()[0].messages[-1]
    same = {
        "shown": notes["shown"] == text and notes["drawn"],
        "kept": kept.text == text,
        "thoughts": kept.reasoning == thought,
    }
    lost = [name for name, equal in same.items() if not equal]
    # None where the machine was so busy that no key came through.
    keys = sorted(run.latencies) or [math.nan]
    longest = max(notes["gaps"], key=lambda gap: gap["wall_s"])
    busiest = max(notes["gaps"], key=lambda gap: gap["cpu_s"])
    rss = [f"{at:.0f} s {size / 2**20:.0f}" for at, size in run.rss[:: max(len(run.rss) // 8, 1)]]
    median, p99 = statistics.median(keys), keys[int(len(keys) * 0.99)]
    lines = (
        ("answer", f"{len(pieces)} tokens in {run.spent_s:.0f} s, {len(pieces) / run.spent_s:.0f} a second"),
        ("lost", ", ".join(lost) or "nothing"),
        (
            "a key shows",
            f"median {median * 1e3:.0f} ms, p99 {p99 * 1e3:.0f}, max {keys[-1] * 1e3:.0f}, {len(keys)} keys",
        ),
        ("loop's gaps", f"longest {longest['wall_s'] * 1e3:.0f} ms, of the processor {busiest['cpu_s'] * 1e3:.0f} ms"),
        ("loop's thread", f"{notes['cpu_s'] / len(pieces) * 1e3:.2f} ms of the processor a token, start included"),
        ("memory", f"MiB: {', '.join(rss)}"),
        ("load", f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"),
    )
    return "\n".join(f"{name:13}  {text}" for name, text in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=9000)
    parser.add_argument("--rate", type=float, default=150.0)
    parser.add_argument("--above", type=int, default=20_000, help="tokens of the conversation above")
    parser.add_argument("--kind", choices=sorted(KINDS), default="prose")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for variable in ("DYNRUN_CACHE", "DYNRUN_DATA", "DYNRUN_CONFIG"):
            os.environ[variable] = str(folder / variable.lower())
        model = write_tiny_llama(folder / "tiny.gguf", n_embd=32, n_block=1, n_ff=32, n_head=2, n_head_kv=1)
        pieces = KINDS[options.kind](options.tokens)
        script = Scripted([pieces], before=Pace(options.rate))
        run = measure(model, folder / "notes.json", script, options.above)
        notes = json.loads((folder / "notes.json").read_text(encoding="utf-8"))
        print(f"{options.kind}, {options.above} tokens above\n{report(run, notes, pieces)}")


if __name__ == "__main__":
    main()
