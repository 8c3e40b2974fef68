"""The child that renders a chat template: hostile input, so it runs here and not in the program.

Reads JSON lines on standard input, writes one for each on standard output. The first sets the templates, the others are
renderings. After its imports it can open no file, write none, and use no more memory than it was given; how long it may
take its parent decides. Imports jinja2 and the standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, Undefined, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import SandboxedEnvironment

MAX_CHARACTERS = 8 << 20
_MEMORY_BYTES = 1 << 30
_MAX_ERROR = 500
_PARENT_POLL_S = 1.0
# Ends with an error: for those Jinja imports more.
_WARM_UP = (
    "{{ {'a': [1]} | tojson }}{{ 'a' | title }}{% for i in range(2) %}{{ i }}{% endfor %}{{ raise_exception('') }}"
)


class Generation(Extension):
    """transformers' tag ``{% generation %}``: marks what the assistant says; the text is the same."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Nothing(Undefined):
    """A value that is not there: added to a text it is empty, as in llama.cpp."""

    def __add__(self, other: Any) -> Any:
        return other

    def __radd__(self, other: Any) -> Any:
        return other


def environment(today: datetime) -> SandboxedEnvironment:
    """Jinja as transformers (utils/chat_template_utils.py) and llama.cpp (common/jinja) have it for templates.

    Lists may be changed, as by some models' templates: they are copies.
    """
    made = SandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation], undefined=Nothing
    )
    made.filters["tojson"] = _tojson
    # Nothing here is HTML: "safe" strings would escape what is added to them.
    made.filters["safe"] = str
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = today.strftime
    return made


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _rendered(template: Template, variables: dict[str, Any]) -> str:
    parts, left = [], MAX_CHARACTERS
    for part in template.generate(**variables):
        left -= len(part)
        if left < 0:
            raise TemplateError(f"it writes more than {MAX_CHARACTERS >> 20} million characters")
        parts.append(part)
    return "".join(parts)


def _limit() -> None:
    """No files from here on, and bounded memory, where the system has such limits."""
    try:
        import resource
    except ImportError:
        return
    with contextlib.suppress(OSError, ValueError):
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY_BYTES, used + _MEMORY_BYTES))
    for name, value in {"FSIZE": 0, "CORE": 0, "NPROC": 0, "NOFILE": 3}.items():
        with contextlib.suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _die_with(parent: int) -> None:
    # A template that loops for ever must not outlive a parent that was killed.
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    os._exit(1)


def _alarm(seconds: float) -> None:
    """End this process then: within one long computation the thread above never runs. 0: never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _failure(error: Exception) -> str:
    """What happened, in one line of bounded length."""
    if isinstance(error, MemoryError):
        return "it needs more memory than a template may have"
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    text = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
    line = " ".join(text[:_MAX_ERROR].split())
    return "".join(filter(str.isprintable, line)) or type(error).__name__


def _answer(templates: dict[str, Template], request: dict[str, Any]) -> dict[str, Any]:
    """``text``, or ``error`` with what the template raised."""
    try:
        return {"text": _rendered(templates[request["template"]], request["variables"])}
    except Exception as error:  # whatever a hostile template makes of Python's types
        return {"error": _failure(error)}


def main() -> None:
    """Serve until standard input ends."""
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    setup = json.loads(sys.stdin.readline())
    made = environment(datetime.fromisoformat(setup["today"]))
    # What Jinja imports only when it is first needed, while files can still be opened.
    _answer({"": made.from_string(_WARM_UP)}, {"template": "", "variables": {}})
    # Compiling computes constants: it is the template's doing already.
    _limit()
    _alarm(setup["deadline_s"] + _PARENT_POLL_S)
    answer: dict[str, Any] = {"ok": True}
    templates: dict[str, Template] = {}
    try:
        templates = {name: made.from_string(source) for name, source in setup["templates"].items()}
    except Exception as error:  # Python's compiler has limits of its own
        answer = {"error": _failure(error)}
    print(json.dumps(answer), flush=True)
    _alarm(0)
    for line in sys.stdin:
        _alarm(setup["deadline_s"] + _PARENT_POLL_S)
        print(json.dumps(_answer(templates, json.loads(line))), flush=True)
        _alarm(0)


if __name__ == "__main__":
    main()
