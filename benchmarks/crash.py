"""Kill commands at random moments, run them again, and compare the bytes with those of an undisturbed run.

usage: .venv/bin/python -m benchmarks.crash --out DIR [--kills 200] [--scenarios make,eval,pull,build] [--seed 1]

Rounds: an empty cache; the command is started and SIGKILLed after a random part of the time it needs, up to 8 times,
then runs to its end. A round survives where that ends well, its files have the undisturbed run's bytes, nothing that
the killed runs started is alive, no temporary file is left, and no half-written file ever stood under a final name.
`build` has few rounds of more kills, as it takes minutes: it makes its environment anew, with the source and the build
of this clone in the cache; `compile` likewise, with the source alone: 12 minutes of a core more, twice.
JSON on standard output: kills, what the command had said last before each, rounds and what did not survive, a line for
each round on standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path

import psutil

from tests.hub_server import Fault, Hub, serving
from tests.tiny import write_tiny_llama

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = (sys.executable, "-m", "dynrun.cli.app")
_SMALL = ("--types", "Q2_K,Q3_K,Q4_K,Q6_K", "--tokens", "2048", "--ctx", "64", "--probe-tokens", "64")
_SMALL += ("--eval-tokens", "512", "--candidates", "1")
_LEFTOVERS = (".part", ".tmp", ".partial", ".incomplete")


@dataclass(frozen=True)
class Scenario:
    """``command`` of a round's folder; ``results``: the files under it that must come out the same.

    ``printed``: the result is what the command prints, in ``printed.json``. ``check``: what is wrong in the end, or "".
    ``prepare``: what lies in the folder of a round of kills before it begins. A kill comes after ``longest``·uᵏ of the
    undisturbed time, k = ``skew``, u uniform: much of what takes minutes is done again after a kill.
    """

    command: Callable[[Path], list[str]]
    results: Callable[[Path], list[Path]]
    environment: Callable[[Path], Mapping[str, str]] = lambda _: {}
    printed: bool = False
    check: Callable[[Path], str] = lambda _: ""
    prepare: Callable[[Path], object] = lambda _: None
    most_kills: int = 8
    longest: float = 0.6
    skew: int = 1


@dataclass
class Tally:
    """What happened to one scenario."""

    kills: int = 0
    at: dict[str, int] = field(default_factory=dict)
    rounds: int = 0
    survived: int = 0
    findings: list[str] = field(default_factory=list)


def environment_of(scenario: Scenario, folder: Path, mark: str) -> dict[str, str]:
    own = {
        "DYNRUN_CACHE": str(folder / "cache"),
        "DYNRUN_CONFIG": str(folder / "none.toml"),
        "DYNRUN_CRASH": mark,
        "DYNRUN_THREADS": "1",
        "HF_HOME": str(folder / "huggingface"),
    }
    return {**os.environ, **own, **scenario.environment(folder)}


def start(scenario: Scenario, folder: Path, mark: str) -> subprocess.Popen[bytes]:
    with (folder / "log.txt").open("ab") as log, (folder / "printed.json").open("wb") as printed:
        return subprocess.Popen(
            scenario.command(folder),
            stdin=subprocess.DEVNULL,
            stdout=printed if scenario.printed else log,
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


def last_said(folder: Path) -> str:
    """The stage that the command named last, in this run or, where it had said nothing yet, the one before."""
    lines = (folder / "log.txt").read_text(errors="replace").splitlines()
    stages = [match[0] for line in lines if (match := re.match(r"[a-z][a-z ]+", line))]
    return stages[-1].strip() if stages else "its start"


def undisturbed(scenario: Scenario, folder: Path) -> tuple[dict[str, str], float]:
    """The hashes that every round must end with, and the seconds that it takes."""
    folder.mkdir(parents=True)
    scenario.prepare(folder)
    begun = time.monotonic()
    process = start(scenario, folder, uuid.uuid4().hex)
    if process.wait():
        sys.exit(f"the undisturbed run failed: {(folder / 'log.txt').read_text(errors='replace')[-2000:]}")
    return hashes(scenario, folder), time.monotonic() - begun


def ended(process: subprocess.Popen[bytes], patience_s: float) -> int:
    """The exit code; of one that does not end, SIGKILL's."""
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def one_round(
    scenario: Scenario, folder: Path, wanted: Mapping[str, str], seconds: float, chance: random.Random, tally: Tally
) -> None:
    """Kill again and again, run to the end, compare."""
    mark, findings = uuid.uuid4().hex, []
    folder.mkdir(parents=True)
    scenario.prepare(folder)
    for _ in range(scenario.most_kills):
        process = start(scenario, folder, mark)
        try:
            process.wait(0.05 + seconds * scenario.longest * chance.random() ** scenario.skew)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            tally.kills += 1
            stage = last_said(folder)
            tally.at[stage] = tally.at.get(stage, 0) + 1
        if orphans := alive(mark):
            findings.append(f"alive after the kill: {orphans}")
        wrong = {name for name, digest in hashes(scenario, folder).items() if wanted.get(name) != digest}
        if wrong and not scenario.printed:
            findings.append(f"half-written under a final name: {sorted(wrong)}")
    if code := ended(start(scenario, folder, mark), seconds * 20 + 600):
        findings.append(f"the last run ended with {code}: {(folder / 'log.txt').read_text(errors='replace')[-500:]}")
    if hashes(scenario, folder) != dict(wanted):
        findings.append("other bytes than undisturbed")
    if left := leftovers(folder):
        findings.append(f"temporary files are left: {left[:5]}")
    if wrong_in_the_end := scenario.check(folder):
        findings.append(wrong_in_the_end)
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
        return [*PROGRAM, "eval", "kld", str(model), *files, "--tokens", "4096", "--json"]

    yield Scenario(command, lambda folder: [folder / "printed.json"], printed=True)


@contextmanager
def pull(shared: Path) -> Iterator[Scenario]:
    """`pull` of 24 shards from a server here, which takes its time and breaks off now and then."""
    chance = random.Random(0)  # noqa: S311
    shards = {f"m-Q4_K_M-{i:05d}-of-00024.gguf": chance.randbytes(2_000_000) for i in range(1, 25)}

    def fault(path: str, start: int, end: int) -> Fault | None:
        time.sleep(0.3)
        return Fault("reset", after=chance.randrange(end - start)) if chance.random() < 0.1 else None

    def results(folder: Path) -> list[Path]:
        return sorted((folder / "huggingface").rglob("snapshots/*/*.gguf"))

    with serving(Hub(models={"o/m": dict(shards)}, fault=fault)) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        yield Scenario(lambda _: [*PROGRAM, "pull", "o/m:Q4_K_M"], results, lambda _: environment)


@contextmanager
def build(shared: Path, cached: Sequence[str] = ("downloads", "builds")) -> Iterator[Scenario]:
    """`build.py` in a clone of its own, with that of the cache; it must end with a program that runs."""
    source, warm = shared / "clone", Path(os.environ.get("DYNRUN_CACHE", Path.home() / ".cache" / "dynrun"))
    if not source.exists():
        subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)

    def command(folder: Path) -> list[str]:
        clone = folder / "clone"
        if not clone.exists():
            shutil.copytree(source, clone)
        # Not the environment's Python: it is what a user has before there is one.
        return [str(Path(sys.base_prefix) / "bin" / "python3"), str(clone / "build.py")]

    def results(folder: Path) -> list[Path]:
        made = folder / "clone" / "vendor" / "llama.cpp" / "CMakeLists.txt"
        return [made] if made.exists() else []

    def check(folder: Path) -> str:
        program = folder / "clone" / ".venv" / "bin" / "dynrun"
        done = subprocess.run([program, "doctor"], capture_output=True, check=False)
        return f"doctor ends with {done.returncode}" if done.returncode else ""

    def prepare(folder: Path) -> None:
        for name in cached:
            shutil.copytree(warm / name, folder / "cache" / name, symlinks=True)

    yield Scenario(command, results, check=check, prepare=prepare, most_kills=20, longest=1.0, skew=4)


SCENARIOS = {
    "make": make,
    "eval": evaluate,
    "pull": pull,
    "build": build,
    "compile": partial(build, cached=("downloads",)),
}


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
    parser.add_argument("--scenarios", default="make,eval,pull,build")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    out: Path = options.out.resolve()
    if out.exists() and any(out.iterdir()):
        parser.error(f"{out} is not empty")
    (out / "shared").mkdir(parents=True)
    write_tiny_llama(out / "shared" / "tiny.gguf", n_block=1)
    names, chance = options.scenarios.split(","), random.Random(options.seed)  # noqa: S311
    tallies = {name: campaign(name, out, -(-options.kills // len(names)), chance) for name in names}
    print(json.dumps({name: asdict(tally) for name, tally in tallies.items()}, indent=1))
    return any(tally.findings for tally in tallies.values())


if __name__ == "__main__":
    sys.exit(main())
