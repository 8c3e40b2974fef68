"""Fixtures of all tests: the user's cache and configuration are not touched, but for the demo model, made once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

from dynrun.config import available_cores

# How long an example takes is the machine's affair, which may be busy.
settings.register_profile("dynrun", deadline=None)
settings.load_profile("dynrun")
# As it was before any test changed it: where the user's own models lie.
_USER_CACHE = os.environ.get("DYNRUN_CACHE")
_SCRUBBED = ("DYNRUN_THREADS", "DYNRUN_N_GPU_LAYERS", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE")


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and no configuration; the compiled llama.cpp is found through sys.prefix anyway."""
    home = tmp_path_factory.mktemp("dynrun")
    monkeypatch.setenv("DYNRUN_CACHE", str(home / "cache"))
    monkeypatch.setenv("DYNRUN_DATA", str(home / "data"))
    monkeypatch.setenv("DYNRUN_CONFIG", str(home / "config.toml"))
    monkeypatch.setenv("HF_HOME", str(home / "huggingface"))
    if library := sys.modules.get("huggingface_hub.constants"):
        monkeypatch.setattr(library, "HF_HUB_CACHE", str(home / "huggingface" / "hub"))
    for name in _SCRUBBED:
        monkeypatch.delenv(name, raising=False)
    # ggml's threads spin while they wait: more of them than cores slow each other down tenfold.
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        monkeypatch.setenv("DYNRUN_THREADS", str(max(1, available_cores() // workers)))
    return home / "cache"


@pytest.fixture(scope="session", autouse=True)
def closed_bindings() -> Iterator[None]:
    """llama-cpp-python opens /dev/null at import and never closes it: a ResourceWarning after pytest's last line."""
    yield
    if utils := sys.modules.get("llama_cpp._utils"):
        utils.outnull_file.close()
        utils.errnull_file.close()


@contextmanager
def in_users_cache() -> Iterator[None]:
    """For what is made once and never changed."""
    with pytest.MonkeyPatch.context() as patch:
        if _USER_CACHE is None:
            patch.delenv("DYNRUN_CACHE", raising=False)
        else:
            patch.setenv("DYNRUN_CACHE", _USER_CACHE)
        yield


def _ensure(name: str) -> Path:
    from dynrun.demo.builtin import ensure_builtin

    with in_users_cache():
        return ensure_builtin(name)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The F16 reference of the built-in model `demo`, in the user's own cache, made if it is not there yet."""
    return _ensure("demo")


@pytest.fixture(scope="session")
def demo_moe_model() -> Path:
    """The F16 reference of `demo-moe`, likewise."""
    return _ensure("demo-moe")
