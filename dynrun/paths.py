"""Where dynrun keeps its files. Standard library only: build.py imports this.

``DYNRUN_CACHE`` and ``DYNRUN_DATA`` override the folders; otherwise the platform's own conventions are followed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """The user's cache folder of dynrun (not created), absolute: programs are run in folders of their own."""
    if override := os.environ.get("DYNRUN_CACHE"):
        return Path(override).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "dynrun"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "dynrun"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynrun"


def config_file() -> Path:
    """The user's configuration file (it need not exist)."""
    if override := os.environ.get("DYNRUN_CONFIG"):
        return Path(override).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA") or Path.home()) / "dynrun" / "config.toml"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "dynrun" / "config.toml"


def data_dir() -> Path:
    """What the user made and would miss, unlike the cache (not created); ``DYNRUN_DATA`` overrides it."""
    if override := os.environ.get("DYNRUN_DATA"):
        return Path(override).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "dynrun"
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA") or Path.home()) / "dynrun"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "dynrun"


def chats_dir() -> Path:
    """Conversations, a file each."""
    return data_dir() / "chats"


def builds_dir() -> Path:
    """Compiled llama.cpp, one folder per fingerprint; shared by all clones."""
    return cache_dir() / "builds"


def downloads_dir() -> Path:
    """Verified downloads."""
    return cache_dir() / "downloads"


def models_dir() -> Path:
    """Built-in models and converted references."""
    return cache_dir() / "models"


def stages_dir() -> Path:
    """Content-addressed results of the stages of ``make``."""
    return cache_dir() / "stages"


def logs_dir() -> Path:
    """Log files of commands and child processes."""
    return cache_dir() / "logs"


def repository_root() -> Path:
    """The clone that this package lies in."""
    return Path(__file__).resolve().parent.parent
