"""What a report says, as plain data: the same object gives the page, the model card and ``report.json``.

Filled by compared.py and made.py, read by everything else here. Holds names of files and no paths, so that nobody's
folders are published with a card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dynrun.metrics.equal_size import EqualSize
from dynrun.metrics.intervals import Ratio
from dynrun.metrics.summary import Summary
from dynrun.scheme_types import Slopes

Interval = tuple[float, float]
# Kinds of files, as tables and plots tell them apart.
MADE, STOCK, OTHER = "dynrun", "stock", "other"


@dataclass(frozen=True)
class Domain:
    """Mean KLD (nats per token) on the texts of one kind."""

    name: str
    n_tokens: int
    mean: float
    ci95: Interval


@dataclass(frozen=True)
class Continued:
    """Along ``n_prompts`` greedy continuations of the reference, of ``n_tokens`` each: the share of those that the file
    continues in the same way to the end, and the median position (from 0) of the first other token."""

    n_prompts: int
    n_tokens: int
    identical: float
    median_parted: float


@dataclass(frozen=True)
class FileResult:
    """One measured file. ``name`` is unique in the report, ``file`` the file's own; fractions are of 1.

    ``types``: of the quantizable tensors. ``imatrix``: what is known of the one it was made with, in words.
    """

    name: str
    file: str
    kind: str
    size_bytes: int
    bpw: float
    kld: Summary
    same_top_p: float
    rms_dp: float
    ppl: float
    domains: tuple[Domain, ...] = ()
    equal_size: EqualSize | None = None
    continued: Continued | None = None
    sha256: str = ""
    imatrix: str = ""
    types: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CurvePoint:
    """A stock preset that was measured on the same text; not ``on_curve`` where a smaller one is as good."""

    ftype: str
    size_bytes: int
    kld: float
    on_curve: bool = True


@dataclass(frozen=True)
class Versus:
    """Mean KLD of the file ``name`` over that of ``other``, paired over sequences."""

    name: str
    other: str
    ratio: Ratio


@dataclass(frozen=True)
class TaskResult:
    """Answers of one file to the questions of one task; efficiency (metrics/efficiency.py) is of MMLU alone.

    Flips are against the reference's answers; None where those are not known.
    """

    task: str
    name: str
    accuracy: float
    ci95: Interval
    n_questions: int
    size_bytes: int
    efficiency_per_gib: float | None = None
    efficiency_per_gb: float | None = None
    right_to_wrong: int | None = None
    wrong_to_right: int | None = None


@dataclass(frozen=True)
class Card:
    """What the Hub wants to know of a model (front matter of the card); "" and () where it is not known."""

    base_model: str = ""
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    pipeline_tag: str = "text-generation"


@dataclass(frozen=True)
class Report:
    """All that a report says of ``model``.

    ``text`` names what was scored, ``n_tokens`` of it; ``slopes`` are the points (weighted error, KLD) of each tensor's
    probes; ``provenance`` are pairs of a heading and a value; ``commands`` make the files again; ``notes`` are what a
    reader must know, as that the reference is itself quantized.
    """

    model: str
    text: str
    n_tokens: int
    ppl_reference: float
    files: tuple[FileResult, ...]
    curve: tuple[CurvePoint, ...] = ()
    versus: tuple[Versus, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    slopes: Slopes = field(default_factory=dict)
    provenance: tuple[tuple[str, str], ...] = ()
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    card: Card = Card()
