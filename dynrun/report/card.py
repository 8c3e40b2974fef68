"""The front matter of a model card, as the Hub expects it, out of what a GGUF says of its model.

Takes metadata that anybody may have written; lets through only what the Hub accepts, so that a push is not refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from dynrun.report.data import Card, Report
from dynrun.report.text import visible

_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_LANGUAGE = re.compile(r"[a-z]{2,3}|multilingual|code")
_TAG = re.compile(r"[\w.:+-]{1,64}", re.ASCII)
_TAGS = ("gguf", "quantized", "imatrix", "llama.cpp", "dynrun")
_MAX_NAME = 96


@cache
def _licenses() -> frozenset[str]:
    """Identifiers that the Hub knows (hub-docs, repositories-licenses); all else is "other" and a name."""
    return frozenset((files("dynrun.report") / "licenses.txt").read_text(encoding="utf-8").split())


def card_of(metadata: Mapping[str, Any], repository: str = "") -> Card:
    """What the reference's ``metadata`` tells; ``repository``: the Hub's, where it is known to be the source."""

    def text(key: str) -> str:
        value = metadata.get(key)
        return value.strip() if isinstance(value, str) else ""

    languages = metadata.get("general.languages")
    found = [one for one in languages if isinstance(one, str)] if isinstance(languages, list | tuple) else []
    return _accepted(
        Card(
            base_model=_repository(repository) or _source(text),
            license=text("general.license"),
            license_name=text("general.license.name"),
            license_link=text("general.license.link"),
            languages=tuple(found),
        )
    )


def _accepted(card: Card) -> Card:
    """What the Hub takes of ``card``: a licence that it does not know is "other", with a name; all else is left out."""
    known = card.license.lower()
    other = bool(known) and known not in _licenses()
    name = visible(card.license_name or ("" if known == "other" else card.license))[:_MAX_NAME]
    return Card(
        base_model=_repository(card.base_model),
        license="other" if other else known,
        license_name=name if other else "",
        license_link=_link(card.license_link) if other else "",
        languages=tuple(one for one in card.languages if _LANGUAGE.fullmatch(one)),
        tags=tuple(one for one in card.tags if _TAG.fullmatch(one)),
        pipeline_tag=card.pipeline_tag if _TAG.fullmatch(card.pipeline_tag) else "",
    )


def _source(text: Any) -> str:
    """The repository that the reference was converted from. general.base_model.* is what *that* was tuned from."""
    keys = ("general.source.huggingface.repository", "general.source.repo_url", "general.source.url")
    return next((found for key in (*keys, "general.repo_url") if (found := _repository(text(key)))), "")


def _repository(name: str) -> str:
    name = re.sub(r"^https?://(www\.)?(huggingface\.co|hf\.co)/", "", name).rstrip("/")
    return name if _REPOSITORY.fullmatch(name) else ""


def _link(url: str) -> str:
    return url if re.fullmatch(r"https?://[!-~]+|[\w./-]+", url, re.ASCII) else ""


def front_matter(report: Report) -> str:
    """The YAML between the two lines of dashes, these included."""
    from huggingface_hub import ModelCardData

    card = _accepted(report.card)
    known: dict[str, Any] = {
        "base_model": card.base_model or None,
        "base_model_relation": "quantized" if card.base_model else None,
        "license": card.license or None,
        "license_name": card.license_name or None,
        "license_link": card.license_link or None,
        "language": list(card.languages) or None,
        "library_name": "gguf",
        "pipeline_tag": card.pipeline_tag or None,
        "tags": list(dict.fromkeys((*_TAGS, *card.tags))),
    }
    return f"---\n{ModelCardData(**known).to_yaml(line_break=chr(10)).rstrip()}\n---\n"
