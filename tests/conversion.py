"""The user's own conversion environment, made once, and models that transformers makes in it."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

import gguf
import pytest

from dynrun.convert.environment import ConversionEnvironment, conversion_environment
from dynrun.paths import cache_dir
from tests.conftest import in_users_cache

_SCRIPT = Path(__file__).parent / "hf_models.py"


def users_environment() -> ConversionEnvironment:
    """The environment in the user's own cache, made if it is not there yet."""
    with in_users_cache():
        return conversion_environment(print)


def share_environment(cache: Path) -> None:
    """Let commands that run with ``cache`` find the user's conversion environment."""
    with in_users_cache():
        shared = cache_dir() / "convert"
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "convert").symlink_to(shared)


def make_models(what: str, source: Path, out: Path) -> Path:
    """Run hf_models.py."""
    environment = users_environment()
    links = out.parent / f"{out.name}-packages"
    links.mkdir()
    # transformers reads GGUFs by gguf-py, which it looks for among the installed packages.
    package = Path(gguf.__file__).parent
    metadata = f"gguf-{importlib.metadata.version('gguf')}.dist-info"
    for path in (package, package.parent / metadata):
        (links / path.name).symlink_to(path)
    variables = environment.variables(out.parent)
    variables["PYTHONPATH"] += f":{links}"
    argv = environment.command(_SCRIPT, what, source, out)
    done = subprocess.run(list(map(str, argv)), env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(done.stderr[-3000:])
    return out
