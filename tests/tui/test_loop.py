"""Nothing keeps the app's event loop waiting."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.tui


def test_the_event_loop_reads_no_files_imports_nothing_and_starts_no_process() -> None:
    argv = [sys.executable, "-m", "tests.tui.loop_watch"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == []
