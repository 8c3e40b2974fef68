"""Run `dynrun` as a user does: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARGV = (sys.executable, "-m", "dynrun.cli.app")


@dataclass(frozen=True)
class Ran:
    """A finished command."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)

    @property
    def error(self) -> str:
        """The one line that a failed command ends with."""
        assert "Traceback" not in self.stderr
        lines = [line for line in self.stderr.splitlines() if line.startswith("dynrun: ")]
        assert len(lines) == 1, self.stderr
        return lines[0].removeprefix("dynrun: ")


def dynrun(
    *arguments: str | Path,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    program: tuple[str, ...] = ARGV,
) -> Ran:
    """Run a command to its end, with the test's own cache."""
    done = subprocess.run(
        [*program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
    )
    return Ran(done.returncode, done.stdout, done.stderr)
