"""The pool of probe workers, with children that speak its protocol and compute nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynrun.calibration.sequences import TokenSequence
from dynrun.errors import DynrunError, NetworkError, UsageError
from dynrun.llamacpp.devices import endpoint_of
from dynrun.sensitivity.sweep import Job, Probe
from dynrun.sensitivity.workers import ProbePool

# A device's name says how its worker behaves.
CHILD = """
import json, os, sys
setup = json.loads(sys.stdin.readline())
def say(**message):
    print(json.dumps(message), flush=True)
device = setup["device"]
print("a driver's noise", file=sys.stderr, flush=True)
if device == "UNKNOWN0":
    say(error={"kind": "UsageError", "message": "no device 'UNKNOWN0'", "fix": "there are CPU"})
    sys.exit(1)
if device == "DEAF0":
    say(error={"kind": "NetworkError", "message": "no answer", "fix": "start it"})
    sys.exit(1)
if device == "FULL0":
    sys.exit("out of memory")
say(ready=True)
for line in sys.stdin:
    request = json.loads(line)
    job = request["job"]
    if device == "FRAIL0":
        print("the device fell off the bus", file=sys.stderr, flush=True)
        os.abort()
    if device == "STUCK0":
        with open(setup["reference"], "a") as pids:
            pids.write(f"{os.getpid()} ")
        say(id=-2)
        continue
    tokens = [sum(setup["sequences"][i][2]) for i in range(job["first"], job["last"])]
    job.pop("last")
    say(id=request["id"], probe=job | {"errors": [0.5], "klds": tokens, "weights": [1], "forward_s": 0, "elapsed_s": 0})
"""
SEQUENCES = [TokenSequence(f"s{i}", "chat", tuple(range(i, i + 5))) for i in range(4)]
JOBS = [Job(f"t{i}", {f"t{i}": "Q4_K"}, i % 3, 4) for i in range(12)]


@pytest.fixture
def command(tmp_path: Path) -> tuple[str, ...]:
    script = tmp_path / "child.py"
    script.write_text(CHILD, encoding="utf-8")
    return (sys.executable, "-I", "-S", str(script))


def pool(
    command: tuple[str, ...], *devices: str, lost: list[DynrunError] | None = None, reference: Path | None = None
) -> ProbePool:
    told = [] if lost is None else lost
    return ProbePool(
        # A stuck child writes into it.
        reference or Path(command[-1]).with_name("m"),
        Path("i"),
        SEQUENCES,
        n_ctx=8,
        n_threads=1,
        devices=devices,
        on_lost=told.append,
        command=command,
    )


def by_name(probes: Iterator[Probe]) -> list[Probe]:
    return sorted(probes, key=lambda probe: probe.name)


def test_more_workers_give_the_same_probes_as_one(command: tuple[str, ...]) -> None:
    with pool(command, "CPU") as one, pool(command, "CPU", "CPU", "CUDA0") as three:
        alone = by_name(one.run(JOBS))
        assert by_name(three.run(JOBS)) == alone
    assert {probe.name for probe in alone} == {job.name for job in JOBS}
    assert next(probe for probe in alone if probe.name == "t1").klds == [15, 20, 25]


def test_a_dead_workers_job_goes_to_another(command: tuple[str, ...]) -> None:
    lost: list[DynrunError] = []
    with pool(command, "FRAIL0", "CPU", "FULL0", lost=lost) as mixed:
        assert {probe.name for probe in mixed.run(JOBS)} == {job.name for job in JOBS}
        # Which of them was needed before the jobs were done is chance; of what was lost the reason is known.
    reasons = {"FRAIL0": "SIGABRT: the device fell off the bus", "FULL0": "exit code 1: out of memory"}
    for error in lost:
        device = next(name for name in reasons if name in error.message)
        assert error.message.endswith(reasons[device])


def test_without_any_worker_left_the_last_ones_device_and_reason_are_told(command: tuple[str, ...]) -> None:
    with pool(command, "FRAIL0") as frail, pytest.raises(DynrunError, match=r"FRAIL0 .*fell off the bus") as raised:
        list(frail.run(JOBS))
    assert raised.value.log is not None
    assert "a driver's noise" in raised.value.log.read_text(encoding="utf-8")
    with pool(command, "DEAF0") as deaf, pytest.raises(NetworkError, match="no probes on DEAF0: no answer"):
        list(deaf.run(JOBS))


def test_a_device_that_is_not_there_is_told_at_once(command: tuple[str, ...]) -> None:
    with pool(command, "STUCK0", "UNKNOWN0") as wrong, pytest.raises(UsageError, match="no device 'UNKNOWN0'"):
        list(wrong.run(JOBS))


def test_jobs_are_asked_for_only_when_a_worker_is_free(command: tuple[str, ...]) -> None:
    asked: list[str] = []

    def jobs() -> Iterator[Job]:
        for job in JOBS:
            asked.append(job.name)
            yield job

    with pool(command, "CPU", "CPU") as two:
        for done, _ in enumerate(two.run(jobs()), start=1):
            assert len(asked) <= done + 2


def test_a_run_that_was_broken_off_leaves_nothing_to_the_next(command: tuple[str, ...]) -> None:
    with pool(command, "CPU", "CPU") as two:
        next(iter(two.run(JOBS[:6])))
        assert {probe.name for probe in two.run(JOBS[6:])} == {job.name for job in JOBS[6:]}
        assert list(two.run([])) == []


def test_workers_end_with_the_pool_whatever_they_do(command: tuple[str, ...], tmp_path: Path) -> None:
    def jobs() -> Iterator[Job]:
        yield from JOBS[:2]
        raise KeyboardInterrupt

    pids_file = tmp_path / "pids"
    with pytest.raises(KeyboardInterrupt), pool(command, "STUCK0", "STUCK0", reference=pids_file) as stuck:
        list(stuck.run(jobs()))
    pids = [int(pid) for pid in pids_file.read_text(encoding="utf-8").split()]
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_closed_pool_says_so(command: tuple[str, ...]) -> None:
    closed = pool(command, "CPU")
    with closed:
        pass
    with pytest.raises(DynrunError, match="closed"):
        list(closed.run(JOBS))


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        ((), "no device to probe on"),
        (("rpc:host",), "names no RPC server"),
        (("rpc::50052",), "names no RPC server"),
        (("rpc:host:99999",), "names no RPC server"),
        (("rpc:host:50052", "CPU", "RPC:host:50052"), "named twice"),
    ],
)
def test_devices_that_make_no_sense_are_refused_before_anything_starts(devices: tuple[str, ...], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        pool(("false",), *devices)


def test_only_rpc_names_have_an_endpoint() -> None:
    assert endpoint_of("rpc:10.0.0.2:50052") == ("10.0.0.2", 50052)
    assert endpoint_of("CUDA0") is None
