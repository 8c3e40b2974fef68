"""Finished probes on disk, a JSON line each, and what they add up to.

A line torn by a kill is dropped and measured again.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from dynrun.artifacts import append_line, read_lines
from dynrun.sensitivity.sweep import Job, Probe

Key = tuple[str, tuple[tuple[str, str], ...]]


class ProbeLog:
    """All probes of a stage; ``klds[key]``: sequence number → its mean KLD, ``errors[key]``: of each tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.klds: dict[Key, dict[int, float]] = {}
        self.weights: dict[int, int] = {}
        self.errors: dict[Key, dict[str, float]] = {}
        self.forward_s = self.elapsed_s = 0.0
        for probe in read_lines(path, lambda line: Probe(**line)):
            self._take(probe)

    def add(self, probe: Probe) -> None:
        """Keep ``probe``, on disk before this returns."""
        self._take(probe)
        append_line(self.path, asdict(probe))

    def _take(self, probe: Probe) -> None:
        key = key_of(probe.name, probe.types)
        found = self.klds.setdefault(key, {})
        for i, (kld, weight) in enumerate(zip(probe.klds, probe.weights, strict=True), start=probe.first):
            found[i], self.weights[i] = kld, weight
        self.errors[key] = dict(zip(probe.types, probe.errors, strict=True))
        self.forward_s += probe.forward_s
        self.elapsed_s += probe.elapsed_s

    @property
    def seconds(self) -> dict[str, float]:
        """What went into forward passes, and into the probes as a whole."""
        return {"forward_s": self.forward_s, "probe_s": self.elapsed_s}

    def lacking(self, name: str, types: dict[str, str], n_sequences: int) -> Job | None:
        """The job that completes the first ``n_sequences`` sequences; None where all are there."""
        known = self.klds.get(key_of(name, types), {})
        missing = [i for i in range(n_sequences) if i not in known]
        return Job(name, types, missing[0], missing[-1] + 1) if missing else None


def key_of(name: str, types: dict[str, str]) -> Key:
    """What a measurement is found by."""
    return name, tuple(sorted(types.items()))
