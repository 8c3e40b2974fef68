"""Several models behind one address: the presets that llama-server's router reads.

Takes options of llama-server for each model, gives the text of an INI file. Starts nothing: the router loads a model
when a request names it, and drops the least recently used one where there would be more than ``--models-max``
(tools/server/README.md; the format is common/preset.cpp's, which knows no quoting).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from dynrun.errors import UsageError

_UNTELLABLE = re.compile(r"[;#\r\n\\]")
_NUMBER = re.compile(r"-\d+(\.\d+)?")


def presets(options: Mapping[str, Sequence[str]]) -> str:
    """A section for each model. Raises UsageError for a name or value that the format cannot hold."""
    lines = ["version = 1", ""]
    for name, argv in options.items():
        _check(name, "]")
        lines += [f"[{name}]", *(f"{key} = {value}" for key, value in _pairs(argv).items()), ""]
    return "\n".join(lines)


def _pairs(argv: Sequence[str]) -> dict[str, str]:
    """Options without their dashes; one that is given several times is joined by commas, as -ot allows."""
    pairs: dict[str, str] = {}
    rest = list(argv)
    while rest:
        key = rest.pop(0).lstrip("-")
        # A flag is followed by another option.
        flag = not rest or (rest[0].startswith("-") and not _NUMBER.fullmatch(rest[0]))
        value = "true" if flag else rest.pop(0)
        _check(value)
        pairs[key] = f"{pairs[key]},{value}" if key in pairs else value
    return pairs


def _check(text: str, also: str = "") -> None:
    if _UNTELLABLE.search(text) or text != text.strip() or (also and also in text):
        raise UsageError(f"the router cannot be told of {text!r}", fix="rename the file: without ; # ] \\")
