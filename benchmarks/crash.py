"""Kill commands at random moments, run them again, and compare the bytes with those of an undisturbed run.

usage: .venv/bin/python benchmarks/crash.py --out DIR [--kills 200] [--scenarios make,eval,pull,build] [--seed 1]

Rounds: an empty cache; the command is started and SIGKILLed after a random part of the time it needs, up to 8 times,
then runs to its end. A round survives where that ends well, its files have the undisturbed run's bytes, nothing that
the killed runs started is alive, no temporary file is left, and no half-written file ever stood under a final name.
JSON on standard output: kills, rounds and what did not survive, a line for each round on standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = (sys.executable, "-m", "dynrun.cli.app")
_MOST_KILLS = 8
_SMALL = ("--tokens", "5120", "--ctx", "64", "--probe-tokens", "64", "--eval-tokens", "512", "--candidates", "2")
_LEFTOVERS = (".part", ".tmp", ".partial")


@dataclass(frozen=True)
class Scenario:
    """``command`` of a round's folder; ``results``: the files under it that must come out the same."""

    command: Callable[[Path], list[str]]
    results: Callable[[Path], list[Path]]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Tally:
    """What happened to one scenario."""

    kills: int = 0
    rounds: int = 0
    survived: int = 0
    findings: list[str] = field(default_factory=list)


def environment_of(scenario: Scenario, folder: Path, mark: str) -> dict[str, str]:
    own = {
        "DYNRUN_CACHE": str(folder / "cache"),
        "DYNRUN_CONFIG": str(folder / "none.toml"),
        "DYNRUN_CRASH": mark,
        "DYNRUN_THREADS": "1",
    }
    return {**os.environ, **own, **scenario.environment}


def start(scenario: Scenario, folder: Path, mark: str) -> subprocess.Popen[bytes]:
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            scenario.command(folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=environment_of(scenario, folder, mark),
        )


def alive(mark: str, patience_s: float = 5.0) -> list[str]:
    """The processes of a round that still run after ``patience_s``."""
    deadline = time.monotonic() + patience_s
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("DYNRUN_CRASH") == mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline())[:80])
            except psutil.Error:
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def hashes(scenario: Scenario, folder: Path) -> dict[str, str]:
    """Names and hashes of a round's results, as far as they are there."""
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in scenario.results(folder)}


def leftovers(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name.endswith(_LEFTOVERS)]


def undisturbed(scenario: Scenario, folder: Path) -> tuple[dict[str, str], float]:
    """The hashes that every round must end with, and the seconds that it takes."""
    folder.mkdir(parents=True)
    begun = time.monotonic()
    process = start(scenario, folder, uuid.uuid4().hex)
    if process.wait():
        sys.exit(f"the undisturbed run failed: {(folder / 'log.txt').read_text(errors='replace')[-2000:]}")
    return hashes(scenario, folder), time.monotonic() - begun


def one_round(
    scenario: Scenario, folder: Path, wanted: Mapping[str, str], seconds: float, chance: random.Random, tally: Tally
) -> None:
    """Kill up to _MOST_KILLS times, run to the end, compare."""
    mark, findings = uuid.uuid4().hex, []
    folder.mkdir(parents=True)
    for _ in range(_MOST_KILLS):
        process = start(scenario, folder, mark)
        try:
            process.wait(chance.uniform(0.05, seconds * 0.6))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            tally.kills += 1
        if orphans := alive(mark):
            findings.append(f"alive after the kill: {orphans}")
        wrong = {name for name, digest in hashes(scenario, folder).items() if wanted.get(name) != digest}
        if wrong:
            findings.append(f"half-written under a final name: {sorted(wrong)}")
    process = start(scenario, folder, mark)
    if code := process.wait(seconds * 20 + 120):
        findings.append(f"the last run ended with {code}: {(folder / 'log.txt').read_text(errors='replace')[-500:]}")
    if hashes(scenario, folder) != dict(wanted):
        findings.append("other bytes than undisturbed")
    if left := leftovers(folder):
        findings.append(f"temporary files are left: {left[:5]}")
    tally.rounds += 1
    tally.survived += not findings
    tally.findings += findings


# -- scenarios -------------------------------------------------------------------------------------------------------


@contextmanager
def make(shared: Path) -> Iterator[Scenario]:
    """`make` with feedback, search and proof."""
    model = shared / "tiny.gguf"

    def command(folder: Path) -> list[str]:
        out = str(folder / "made.gguf")
        return [*PROGRAM, "make", str(model), "--quant", "Q3_K_M", *_SMALL, "--out", out]

    def results(folder: Path) -> list[Path]:
        return [path for path in (folder / "made.gguf", folder / "made.scheme.toml") if path.exists()]

    yield Scenario(command, results)


@contextmanager
def evaluate(shared: Path) -> Iterator[Scenario]:
    """`eval kld` of two files; its result is what it prints, on its own."""
    from dynrun.llamacpp import tools

    model, files = shared / "tiny.gguf", []
    for label in ("Q8_0", "Q4_0"):
        if not (shared / f"{label}.gguf").exists():
            tools.quantize(model, f"{label}.gguf", label, folder=shared, n_threads=1)
        files.append(str(shared / f"{label}.gguf"))

    def command(folder: Path) -> list[str]:
        argv = [*PROGRAM, "eval", "kld", str(model), *files, "--tokens", "8192", "--json"]
        quoted = " ".join(map(shlex.quote, argv))
        out = shlex.quote(str(folder / "rows.json"))
        return ["bash", "-c", f"{quoted} > {out}.new && mv {out}.new {out}"]

    yield Scenario(command, lambda folder: [p for p in (folder / "rows.json",) if p.exists()])


@contextmanager
def build(shared: Path) -> Iterator[Scenario]:
    """`build.py` in a clone of its own, with what is compiled already; it must end with a program that runs."""
    source = shared / "clone"
    if not source.exists():
        subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)

    def command(folder: Path) -> list[str]:
        clone = folder / "clone"
        if not clone.exists():
            shutil.copytree(source, clone)
        return ["bash", "-c", f"{sys.executable} {clone}/build.py && exec {clone}/.venv/bin/dynrun doctor"]

    def results(folder: Path) -> list[Path]:
        made = folder / "clone" / "vendor" / "llama.cpp" / "CMakeLists.txt"
        return [made] if made.exists() else []

    cache = os.environ.get("DYNRUN_CACHE", str(Path("~/.cache/dynrun").expanduser()))
    yield Scenario(command, results, {"DYNRUN_CACHE": cache})


SCENARIOS = {"make": make, "eval": evaluate, "build": build}


def campaign(name: str, out: Path, kills: int, chance: random.Random) -> Tally:
    """Rounds of one scenario until so many kills."""
    tally, shared = Tally(), out / "shared"
    with SCENARIOS[name](shared) as scenario:
        wanted, seconds = undisturbed(scenario, out / name / "undisturbed")
        print(f"{name}: {seconds:.1f} s undisturbed, {len(wanted)} files", file=sys.stderr, flush=True)
        while tally.kills < kills:
            folder = out / name / f"round-{tally.rounds}"
            before = len(tally.findings)
            one_round(scenario, folder, wanted, seconds, chance, tally)
            found = tally.findings[before:]
            print(f"{name}: {tally.kills} kills, {tally.survived}/{tally.rounds} {found}", file=sys.stderr, flush=True)
            if not found:
                shutil.rmtree(folder)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=200, help="over all scenarios")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    out: Path = options.out.resolve()
    if out.exists() and any(out.iterdir()):
        parser.error(f"{out} is not empty")
    (out / "shared").mkdir(parents=True)
    from tests.tiny import write_tiny_llama

    write_tiny_llama(out / "shared" / "tiny.gguf")
    names, chance = options.scenarios.split(","), random.Random(options.seed)  # noqa: S311
    tallies = {name: campaign(name, out, -(-options.kills // len(names)), chance) for name in names}
    print(json.dumps({name: asdict(tally) for name, tally in tallies.items()}, indent=1))
    return any(tally.findings for tally in tallies.values())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
