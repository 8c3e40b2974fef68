"""How fast a model runs here: llama-bench in rounds, until the noise is small or the time is used up.

Takes setups (a model and where it goes) and tests, gives row by row what was measured. All setups take turns in every
round, so that a machine that slows down slows all of them; the first test of the first setup, run before and after
every round, is the anchor by which that is seen. Compares nothing with earlier benches (bench_history.py).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from dynrun.errors import UsageError
from dynrun.gguf.header import read_header
from dynrun.llamacpp import tools
from dynrun.metrics.rates import Drift, drift, rate
from dynrun.runtime.placement import Placement

# A change of the anchor below this part is no throttling worth a word.
_DRIFT = 0.03
_LEAST_ROUNDS = 3
_REPETITIONS = 3
_TEST = re.compile(r"(?:(pp|tg)(\d+))(?:@d(\d+))?")


@dataclass(frozen=True)
class Workload:
    """Prompt processing (``n_prompt``) or text generation (``n_gen``), behind ``n_depth`` tokens of context."""

    n_prompt: int = 0
    n_gen: int = 0
    n_depth: int = 0

    @property
    def name(self) -> str:
        """As it is written: ``pp512``, ``tg128@d4096``."""
        kind = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{kind}@d{self.n_depth}" if self.n_depth else kind


def parse_tests(text: str) -> tuple[Workload, ...]:
    """``pp512,tg128,tg32@d4096``. Raises UsageError for anything else."""
    tests = []
    for word in text.split(","):
        match = _TEST.fullmatch(word.strip().lower())
        if match is None or int(match[2]) == 0:
            raise UsageError(f"{word.strip()!r} is no test", fix="as in pp512,tg128,tg32@d4096")
        size, depth = int(match[2]), int(match[3] or 0)
        tests.append(Workload(size, 0, depth) if match[1] == "pp" else Workload(0, size, depth))
    return tuple(dict.fromkeys(tests))


@dataclass(frozen=True)
class Setup:
    """A model, as ``name``, in a ``placement`` that ``options`` tell llama-bench. ``bytes_per_token`` that one token of
    text reads, over ``bytes_per_s``, is the least time it takes; 0 where that is not known. ``planned`` where the
    placement is the planner's."""

    name: str
    model: Path
    placement: str
    options: tuple[str, ...]
    bytes_per_token: float = 0.0
    bytes_per_s: float = 0.0
    planned: Placement | None = None


@dataclass(frozen=True)
class Limits:
    """Go on until every interval is within ``precision`` of its mean, for at most ``seconds`` in all."""

    precision: float = 0.03
    seconds: float = 300.0


@dataclass(frozen=True)
class Row:
    """One test of one setup: tokens per second, standard deviation and 95% interval over ``rounds``.

    ``bandwidth_share``: of generation, the bytes that it reads a second over what the memory gives; None where one is
    not known. ``noisy``: the time was used up before the interval was small enough.
    """

    model: str
    path: str
    size_bytes: int
    placement: str
    test: str
    tokens_per_second: float
    stddev: float
    ci95: tuple[float, float]
    rounds: tuple[float, ...]
    bandwidth_share: float | None
    noisy: bool


@dataclass(frozen=True)
class Bench:
    """All rows, and how the anchor's speed changed meanwhile (None: too few runs to say)."""

    rows: tuple[Row, ...]
    drift: Drift | None
    elapsed_s: float

    @property
    def drifted(self) -> bool:
        """Whether the machine became slower or faster under the bench."""
        return self.drift is not None and self.drift.proven and abs(self.drift.change) > _DRIFT


Progress = Callable[[int, float, float], None]
"""Rounds done, seconds used, and the widest interval as a part of its mean (infinite at first)."""


def bench(
    setups: Sequence[Setup],
    tests: Sequence[Workload],
    limits: Limits,
    *,
    n_threads: int,
    on_progress: Progress = lambda *_: None,
    cancel: threading.Event | None = None,
) -> Bench:
    """Measure every test of every setup. Raises ToolError where llama-bench fails, which it does out of memory, or
    where ``cancel`` was set."""
    runs = _Runs(setups, tests, n_threads, cancel)
    while True:
        runs.round()
        widest, used = runs.widest(), time.monotonic() - runs.began
        on_progress(runs.n_rounds, used, widest)
        # The next round would take as long as those before.
        over = used + used / runs.n_rounds > limits.seconds
        if runs.n_rounds >= _LEAST_ROUNDS and (widest <= limits.precision or over):
            break
    runs.anchor()
    return Bench(tuple(runs.rows(limits.precision)), runs.drift(), time.monotonic() - runs.began)


@dataclass
class _Runs:
    setups: Sequence[Setup]
    tests: Sequence[Workload]
    n_threads: int
    cancel: threading.Event | None = None
    n_rounds: int = 0
    began: float = field(default_factory=time.monotonic)
    speeds: dict[tuple[int, Workload], list[float]] = field(default_factory=dict)
    anchors: list[tuple[float, float]] = field(default_factory=list)

    def round(self) -> None:
        """Every test of every setup once."""
        self.anchor()
        for i, setup in enumerate(self.setups):
            for test in self.tests:
                self.speeds.setdefault((i, test), []).append(self._run(setup, test, _REPETITIONS))
        self.n_rounds += 1

    def anchor(self) -> None:
        """The same short test again."""
        first = self.tests[0]
        short = Workload(min(first.n_prompt, 128), min(first.n_gen, 32))
        speed = self._run(self.setups[0], short, 1)
        self.anchors.append((time.monotonic() - self.began, speed))

    def _run(self, setup: Setup, test: Workload, repetitions: int) -> float:
        """The median speed of some repetitions: a disturbance of one of them does not count."""
        (row,) = tools.bench(
            setup.model,
            n_prompt=test.n_prompt,
            n_gen=test.n_gen,
            n_depth=test.n_depth,
            repetitions=repetitions,
            n_threads=self.n_threads,
            options=setup.options,
            cancel=self.cancel,
        )
        return median(row.samples)

    def widest(self) -> float:
        """The widest interval, as a part of its mean."""
        return max(rate(rounds).half_width for rounds in self.speeds.values())

    def drift(self) -> Drift | None:
        return drift([at for at, _ in self.anchors], [speed for _, speed in self.anchors])

    def rows(self, precision: float) -> list[Row]:
        return [self._row(self.setups[i], test, rounds, precision) for (i, test), rounds in self.speeds.items()]

    def _row(self, setup: Setup, test: Workload, rounds: list[float], precision: float) -> Row:
        found = rate(rounds)
        share = None
        if test.n_gen and setup.bytes_per_token and setup.bytes_per_s:
            share = found.mean * setup.bytes_per_token / setup.bytes_per_s
        return Row(
            model=setup.name,
            path=str(setup.model),
            size_bytes=read_header(setup.model).file_bytes,
            placement=setup.placement,
            test=test.name,
            tokens_per_second=found.mean,
            stddev=found.stddev,
            ci95=found.ci95,
            rounds=tuple(rounds),
            bandwidth_share=share,
            noisy=found.half_width > precision,
        )
