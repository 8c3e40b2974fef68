"""All rules, over one model.

Takes a header, and where there are any its config.json and a way to read tensors; gives findings, the worst first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dynrun.gguf.header import Header
from dynrun.lint.config import check_config, text_config
from dynrun.lint.finding import Finding, Severity, Subject
from dynrun.lint.provenance import check_provenance
from dynrun.lint.rope import check_rope
from dynrun.lint.shapes import check_shapes
from dynrun.lint.template import check_template
from dynrun.lint.tokens import check_tokens

_RULES: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    *(check_template, check_tokens, check_rope, check_config, check_shapes, check_provenance),
)
_ORDER: tuple[Severity, ...] = ("error", "warning", "info")


def lint(
    header: Header, config: Mapping[str, Any] | None = None, read_tensor: Callable[[str], bytes] | None = None
) -> list[Finding]:
    """What is wrong with a model, errors first."""
    if not header.architecture:
        return [Finding("architecture-missing", "error", "general.architecture", "an architecture", "none")]
    subject = Subject(header, text_config(config or {}), read_tensor)
    findings = [finding for rule in _RULES for finding in rule(subject)]
    return sorted(findings, key=lambda finding: _ORDER.index(finding.severity))


def missing_shards(numbers: tuple[int, ...], name: str) -> Finding:
    """Where shards are missing, nothing else can be looked at."""
    found = f"no number {', '.join(map(str, numbers))}"
    return Finding("shard-missing", "error", name, "all shards", found)
