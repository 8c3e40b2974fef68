"""Fuzz everything that reads strangers' bytes (tests/fuzz_targets.py), guided by coverage: atheris, a process a target.

usage: pip install --target DIR atheris
       PYTHONPATH=DIR:. .venv/bin/python benchmarks/fuzz.py OUT [--seconds 180] [--targets NAME,NAME] [--jobs 1]

A finding is an exception that is no error for people, an input that takes over 5 s, or a process of over 512 MB. The
input goes to OUT/TARGET/findings, what else is interesting to OUT/TARGET/corpus, where the next run goes on. JSON on
standard output: executions, corpus and findings of each target. Exits with 1 where there are findings.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_TIMEOUT_S, _MEMORY_MB, _LONGEST = 5, 512, 1 << 16


def child(name: str, arguments: list[str]) -> None:
    """Fuzz one target in this process; libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["dynrun"]):
        from tests import fuzz_targets

    folder = Path(tempfile.mkdtemp())

    def one(data: bytes) -> None:
        fuzz_targets.tried(name, data, folder)

    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


def fuzz(name: str, out: Path, seconds: int) -> dict[str, object]:
    """One target for so long, in a child process."""
    corpus, findings = out / name / "corpus", out / name / "findings"
    for folder in (corpus, findings):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        return _fuzz(name, corpus, findings, seconds, Path(scratch))


def _fuzz(name: str, corpus: Path, findings: Path, seconds: int, scratch: Path) -> dict[str, object]:
    from tests.fuzz_targets import seeds

    for number, data in enumerate(seeds(name, scratch)):
        (corpus / f"seed-{number}").write_bytes(data)
    limits = [f"-max_total_time={seconds}", f"-timeout={_TIMEOUT_S}", f"-rss_limit_mb={_MEMORY_MB}"]
    options = [*limits, f"-max_len={_LONGEST}", "-print_final_stats=1", f"-artifact_prefix={findings}/", str(corpus)]
    log = corpus.with_name("log.txt")
    with log.open("w") as stream:
        command = [sys.executable, __file__, str(corpus), "--child", name, *options]
        environment = {**os.environ, "TMPDIR": str(scratch)}
        subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False, cwd=ROOT, env=environment)
        # A machine that stands still makes every input slow: those that are not, on their own, are no finding.
        for slow in findings.glob("timeout-*"):
            alone = [sys.executable, __file__, str(corpus), "--child", name, *limits[1:], str(slow)]
            if not subprocess.run(
                alone, stdout=stream, stderr=stream, check=False, cwd=ROOT, env=environment
            ).returncode:
                slow.unlink()
    text = log.read_text(errors="replace")
    executed = [int(n) for n in re.findall(r"stat::number_of_executed_units: *(\d+)", text)]
    done = [int(n) for n in re.findall(r"Done (\d+) runs", text)]
    return {
        "target": name,
        "executions": max(executed + done, default=0),
        "corpus": len(list(corpus.iterdir())),
        "findings": sorted(one.name for one in findings.iterdir()),
        "log": str(log),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=int, default=180)
    parser.add_argument("--targets", default="")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], options.child[1:])
        return 0
    from tests.fuzz_targets import TARGETS

    names = [name for name in options.targets.split(",") if name] or list(TARGETS)
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda name: fuzz(name, options.out.resolve(), options.seconds), names))
    print(json.dumps({"seconds": options.seconds, "targets": rows}, indent=1))
    return any(row["findings"] or not row["executions"] for row in rows)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
