"""Tests of the app are coroutines: each runs in an event loop of its own."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import Hub, serving_here
from tests.tiny import write_tiny_llama

_LONGEST_S, _LONGEST_NATIVE_S = 180.0, 900.0


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine function to its end."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    # Those of its fixtures that it names.
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    # A message that nobody handles would otherwise be waited for until the whole run's limit.
    longest_s = _LONGEST_NATIVE_S if pyfuncitem.get_closest_marker("native") else _LONGEST_S
    asyncio.run(asyncio.wait_for(pyfuncitem.obj(**arguments), longest_s))
    return True


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with the tiny model."""
    (tmp_path / "served").mkdir()
    with serving_here(monkeypatch, tmp_path) as served:
        served.models["o/tiny-GGUF"] = {"tiny-F16.gguf": write_tiny_llama(tmp_path / "served" / "tiny-F16.gguf")}
        yield served
