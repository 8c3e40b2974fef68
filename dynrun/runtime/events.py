"""What a session says while it works: frozen messages, in the order in which things happen.

The terminal prints them, the app posts them to its widgets; nothing in runtime/ prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dynrun.runtime.placement import Placement

Stop = Literal["end", "length", "cancelled"]


@dataclass(frozen=True)
class Timings:
    """Tokens, their time and tokens per second, of the prompt and of the answer, as llama-server measured them;
    ``cache_n`` tokens of the prompt needed no reading."""

    prompt_n: int = 0
    prompt_ms: float = 0.0
    prompt_per_second: float = 0.0
    predicted_n: int = 0
    predicted_ms: float = 0.0
    predicted_per_second: float = 0.0
    cache_n: int = 0


@dataclass(frozen=True)
class Answer:
    """``text`` without the thoughts; ``reasoning`` is empty where the model has none. ``first_token_s``: from the
    request to the first text or thought; None where there was none."""

    text: str
    reasoning: str
    timings: Timings
    stop: Stop = "end"
    first_token_s: float | None = None


@dataclass(frozen=True)
class Starting:
    """A llama-server starts; without a placement where one that runs already is used."""

    placement: Placement | None
    remembered: bool = False


@dataclass(frozen=True)
class Retreated:
    """Memory ran out (``cause``); it is tried again with ``placement``."""

    cause: str
    placement: Placement


@dataclass(frozen=True)
class Ready:
    """Requests are answered at ``url``, in a context of ``n_ctx`` tokens."""

    url: str
    n_ctx: int
    elapsed_s: float


@dataclass(frozen=True)
class Reading:
    """``done`` of the ``total`` tokens of the prompt."""

    done: int
    total: int


@dataclass(frozen=True)
class Thought:
    """A piece of the model's thoughts."""

    text: str


@dataclass(frozen=True)
class Said:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Restarted:
    """The answer so far is void: it begins again."""


@dataclass(frozen=True)
class Finished:
    """The answer is over."""

    answer: Answer


Event = Starting | Retreated | Ready | Reading | Thought | Said | Restarted | Finished
