"""Sources mixed by weight: ``builtin:2,self:3,mydata.jsonl:1,hf:owner/name:2``.

Takes such a text and the sources that it names, gives conversations in proportion. Renders and tokenizes nothing: the
caller counts tokens. ``self`` is generated elsewhere (generated.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from dynrun.calibration.conversation import Conversation
from dynrun.calibration.dataset import BUILTIN_NAME, Source, builtin
from dynrun.calibration.files import LIMIT_CHARS, read_file
from dynrun.calibration.hub import PREFIX, open_hub, parse_hub_name
from dynrun.calibration.splits import Split, split_of_source
from dynrun.errors import NotFoundError, UsageError

SELF_NAME = "self"
_NAMES = (BUILTIN_NAME, SELF_NAME)
_WEIGHT = re.compile(r":([+-]?(?:\d+\.?\d*|\.\d+))$")


@dataclass(frozen=True)
class Ingredient:
    """One source of a mixture: ``spec`` as the user wrote it, and its share of the tokens before normalizing."""

    spec: str
    weight: float


@dataclass(frozen=True)
class Draw:
    """``conversations`` in the order to read them in, the tokens of each source by its name, and what was missing.

    ``shortfalls`` are lines for people.
    """

    conversations: tuple[Conversation, ...]
    tokens_of: Mapping[str, int]
    shortfalls: tuple[str, ...]


def parse_mixture(text: str) -> tuple[Ingredient, ...]:
    """The ingredients of a mixture; a trailing ``:number`` is a weight, 1 where there is none.

    Raises UsageError for a name that is none, a weight that is not above zero, or a source that is named twice;
    NotFoundError for a file that is not there.
    """
    found: dict[str, Ingredient] = {}
    for part in (piece.strip() for piece in text.split(",")):
        if not part:
            raise UsageError(f"empty source in the mixture {text!r}", fix="write for example builtin:2,mydata.jsonl:1")
        match = _WEIGHT.search(part)
        spec, weight = (part[: match.start()], float(match[1])) if match else (part, 1.0)
        if weight <= 0:
            raise UsageError(f"the weight of {spec} is {weight:g}", fix="give one above zero, or leave it out")
        identity = _identity(spec)
        if identity in found:
            raise UsageError(f"the source {spec} is named twice", fix="name it once, with the sum of the weights")
        found[identity] = Ingredient(spec, weight)
    return tuple(found.values())


def open_ingredient(spec: str, *, limit_chars: int = LIMIT_CHARS) -> Source:
    """The source that ``spec`` means, its text at most ``limit_chars`` characters; not ``self``.

    Raises as :func:`parse_mixture`, :func:`~dynrun.calibration.files.read_file` and
    :func:`~dynrun.calibration.hub.open_hub` do.
    """
    _identity(spec)
    if spec == BUILTIN_NAME:
        return builtin()
    if spec.startswith(PREFIX):
        return open_hub(spec, limit_chars=limit_chars)
    if spec == SELF_NAME:
        raise UsageError("the model's own answers need a model", fix="name self in a command that has one")
    return read_file(Path(spec).expanduser(), name=spec, limit_chars=limit_chars)


def _identity(spec: str) -> str:
    """The same for two ways of writing one source. Raises UsageError or NotFoundError for what is none."""
    if spec in _NAMES:
        return spec
    if spec.startswith(PREFIX):
        return repr(parse_hub_name(spec))
    path = Path(spec).expanduser()
    if path.is_file():
        return str(path.resolve())
    if path.suffix or len(path.parts) != 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, siblings, n=1, cutoff=0.7)
        fix = f"did you mean {path.parent / near[0]}?" if near else "check the path"
        raise NotFoundError(f"the calibration file {spec} does not exist", fix=fix)
    near = get_close_matches(spec, _NAMES, n=1, cutoff=0.5)
    fix = f"did you mean {near[0]}?" if near else f"there are {', '.join(_NAMES)}, files, and hf:owner/name"
    raise UsageError(f"no calibration source {spec!r}", fix=fix)


def draw(
    sources: Sequence[tuple[Source, float]],
    which: Split,
    *,
    n_tokens: int,
    count: Callable[[Conversation], int],
) -> Draw:
    """Conversations of one split of every source, ``n_tokens`` in all, the last one possibly beyond.

    Each next one is of the source that has the fewest tokens for its weight (deficit round robin, counted in tokens),
    so that every beginning of the list has the proportions to within one conversation of each source. Where a source
    has no more, the others go on among themselves. ``count`` gives the tokens of a conversation, is asked once for each
    that is looked at, and passes over those of which it says 0. The same arguments give the same draw.
    """
    left: list[Iterator[tuple[Conversation, int]]] = [_counted(source, which, count) for source, _ in sources]
    tokens = [0] * len(sources)
    running = [i for i, (_, weight) in enumerate(sources) if weight > 0]
    chosen: list[Conversation] = []
    dry: list[int] = []
    while running and sum(tokens) < n_tokens:
        i = min(running, key=lambda i: tokens[i] / sources[i][1])
        if (following := next(left[i], None)) is None:
            running.remove(i)
            dry.append(i)
            continue
        conversation, n = following
        chosen.append(conversation)
        tokens[i] += n
    tokens_of = {source.name: n for (source, _), n in zip(sources, tokens, strict=True)}
    shortfalls = [_shortfall(sources, i, tokens[i], n_tokens) for i in dry]
    if sum(tokens) < n_tokens and len(sources) > 1:
        shortfalls.append(f"all sources together have {sum(tokens):,} of {n_tokens:,} tokens")
    return Draw(tuple(chosen), tokens_of, tuple(shortfalls))


def _counted(source: Source, which: Split, count: Callable[[Conversation], int]) -> Iterator[tuple[Conversation, int]]:
    for conversation in split_of_source(source, which):
        if (n := count(conversation)) > 0:
            yield conversation, n


def _shortfall(sources: Sequence[tuple[Source, float]], i: int, tokens: int, n_tokens: int) -> str:
    source, weight = sources[i]
    share = round(n_tokens * weight / sum(weight for _, weight in sources))
    return (
        f"{source.name} has {tokens:,} of its {share:,} tokens; the other sources give the rest"
        if (len(sources) > 1)
        else f"{source.name} has {tokens:,} of {n_tokens:,} tokens"
    )
