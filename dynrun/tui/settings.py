"""What the user may set of the app: its theme and its keys, in the table ``[tui]`` of config.toml::

    [tui]
    theme = "dynrun-light"
    [tui.keys]
    "app.jump" = "ctrl+g"          # the ids stand in the app's help

A theme that is chosen inside the app is remembered beside the cache; the configuration file goes before it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from dynrun.artifacts import write_json
from dynrun.config import load_tui_table
from dynrun.errors import MALFORMED, DynrunError, UsageError
from dynrun.paths import cache_dir, config_file


@dataclass(frozen=True)
class TuiSettings:
    """``theme``: empty where nobody has chosen one. ``keys``: binding id to keys, as Textual spells them."""

    theme: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)


def load_settings() -> TuiSettings:
    """From the configuration file, and the remembered theme. Raises UsageError for what is no setting."""
    table = load_tui_table()
    theme, keys = table.get("theme", ""), table.get("keys", {})
    if unknown := sorted(table.keys() - {"theme", "keys"}):
        raise UsageError(f"{config_file()}: unknown setting {unknown[0]!r} in [tui]", fix="known: theme, keys")
    if not isinstance(theme, str) or not isinstance(keys, dict) or not all(isinstance(k, str) for k in keys.values()):
        raise UsageError(f"{config_file()}: bad [tui]", fix='theme = "NAME", and [tui.keys] with "app.jump" = "ctrl+g"')
    return TuiSettings(theme or _remembered_theme(), keys)


def check_keys(keys: Mapping[str, str], known: Iterable[str]) -> None:
    """Raises UsageError for an id that no binding has, naming the nearest."""
    known = sorted(known)
    for name in keys:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "the ids stand in the app's help (F1)"
            raise UsageError(f"{config_file()}: no key binding is called {name!r}", fix=hint)


def remember_theme(name: str) -> None:
    """For the next start. What cannot be written is forgotten: a theme is not worth an error."""
    with suppress(OSError, DynrunError):
        write_json(_state_file(), {"theme": name})


def _remembered_theme() -> str:
    try:
        theme = json.loads(_state_file().read_text(encoding="utf-8"))["theme"]
    except (OSError, *MALFORMED):
        return ""
    return theme if isinstance(theme, str) else ""


def _state_file() -> Path:
    return cache_dir() / "tui.json"
