"""Downloads that were begun in the app and are not done: remembered, so that the next start can offer to go on.

What has come of them lies in the model cache, whatever happens here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dynrun.artifacts import write_json
from dynrun.errors import DynrunError
from dynrun.paths import downloads_dir


def unfinished() -> list[str]:
    """Their MODELs, in the order in which they were begun."""
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def remember(models: Sequence[str]) -> None:
    """These and no others. A full disk forgets them: `pull` goes on with them all the same."""
    with suppress(OSError, DynrunError):
        write_json(_file(), list(models))


def _file() -> Path:
    return downloads_dir() / "unfinished.json"
