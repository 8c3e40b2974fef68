"""Settings: flag, then environment, then configuration file, then default."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrun.errors import UsageError
from dynrun.paths import config_file


@dataclass(frozen=True)
class Config:
    """What a user may set once for all commands.

    ``threads``: CPU threads for llama.cpp and torch (0: all cores of this process).
    ``n_gpu_layers``: layers that go to the GPU in the engine (-1: all, where there is a GPU).
    """

    threads: int = 0
    n_gpu_layers: int = -1

    @property
    def n_threads(self) -> int:
        return self.threads or available_cores()


# Every setting and its least value.
_LEAST = {"threads": 0, "n_gpu_layers": -1}


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_config() -> Config:
    """Read ``config.toml`` and the ``DYNRUN_*`` variables.

    Raises UsageError for an unknown key or a value that is no integer or out of range.
    """
    values = _from_file(config_file()) | _from_environment()
    for key, value in values.items():
        if value < _LEAST[key]:
            raise UsageError(f"the setting {key} is {value}", fix=f"the least value is {_LEAST[key]}")
    return Config(**values)


def load_tui_table() -> dict[str, Any]:
    """The table ``[tui]`` of ``config.toml``, as it stands there; the app checks it. Raises UsageError for bad TOML."""
    table = _read(config_file()).get("tui", {})
    if not isinstance(table, dict):
        raise UsageError(f"{config_file()}: tui is no table", fix="write it as [tui]")
    return table


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}", fix="correct or remove it") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", fix="check its permissions") from error


def _from_file(path: Path) -> dict[str, int]:
    data = {key: value for key, value in _read(path).items() if key != "tui"}
    for key, value in data.items():
        # A TOML boolean is an int to Python.
        if key not in _LEAST or type(value) is not int:
            raise UsageError(f"{path}: bad setting {key!r}", fix=f"known integers: {', '.join(sorted(_LEAST))}")
    return data


def _from_environment() -> dict[str, int]:
    values = {}
    for key in _LEAST:
        if text := os.environ.get(f"DYNRUN_{key.upper()}"):
            try:
                values[key] = int(text)
            except ValueError as error:
                raise UsageError(f"DYNRUN_{key.upper()}={text} is no integer", fix="set it to a number") from error
    return values
