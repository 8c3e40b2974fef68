"""Whether a scheme is to be rounded with error feedback, and in which kinds of tensors, by measured KLD.

Takes the chosen scheme, puts it in place with feedback, without, and with one doubtful kind of tensors after the other
left plain, and keeps what is best on the selection text: a file with feedback is never worse than without, as far as
that text can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from dynrun.allocation.bench import types_key
from dynrun.allocation.search_stage import open_bench
from dynrun.allocation.speed import kind_of
from dynrun.artifacts import Outcome, StageFolder, run_stage, stage_folder
from dynrun.calibration.sequences import TokenSequence, fingerprint
from dynrun.calibration.stage import ImatrixStage
from dynrun.config import Config
from dynrun.metrics.intervals import Clusters, Ratio, paired_ratio
from dynrun.models import Reference
from dynrun.rounding.store import Feedback
from dynrun.scheme import Scheme

_LOG_FILE = "measured.jsonl"
_REVISION = 2
# Mean ratio of held-out output errors from which on a kind's KLD is measured without feedback too.
_DOUBTFUL, _EMBEDDING = 0.75, "token_embd"
Narrator = Callable[[float, float, str], None]


class Measures(Protocol):
    """What puts schemes in place (bench.Bench)."""

    @property
    def weights(self) -> list[int]: ...
    def scheme(self, types: Mapping[str, str], plain: Collection[str] = ()) -> list[float]: ...


@dataclass(frozen=True)
class RoundingStage:
    """``feedback``: whether it is kept, but in the kinds ``plain``; the KLD (nats per token) of the scheme on the
    selection text, ``kld`` as it is kept, ``plain_kld`` all plain, and ``ratio`` of the two with its 95% interval."""

    feedback: bool
    plain: tuple[str, ...]
    kld: float
    plain_kld: float
    ratio: float
    ratio_ci95: tuple[float, float]
    outcome: Outcome

    def applied(self, scheme: Scheme, feedback: Feedback) -> Scheme:
        """``scheme`` with what it is to say of its rounding."""
        if not self.feedback:
            return replace(scheme, feedback="", feedback_except="")
        return replace(scheme, feedback=feedback.text, feedback_except=" ".join(self.plain))


def tensors_of(types: Iterable[str], kinds: Iterable[str]) -> list[str]:
    """The tensors of some kinds."""
    chosen = frozenset(kinds)
    return [name for name in types if kind_of(name) in chosen]


def choose_rounding(
    reference: Reference,
    imatrix: ImatrixStage,
    scheme: Scheme,
    text: Sequence[TokenSequence],
    feedback: Feedback,
    *,
    config: Config,
    narrate: Narrator,
) -> RoundingStage:
    """Measure a scheme's roundings on ``text``, or find what was measured."""
    folder = rounding_folder(reference, imatrix, scheme, text, feedback.key)

    def work(folder: StageFolder) -> Mapping[str, Any]:
        with closing(open_bench(reference, imatrix, text, config, folder / _LOG_FILE, feedback)) as bench:
            return best_rounding(bench, scheme.types, doubtful_kinds(scheme.types, feedback), narrate)

    outcome = run_stage(folder, work)
    found = outcome.result
    ci95 = (found["ratio_ci95"][0], found["ratio_ci95"][1])
    numbers = (found["kld"], found["plain_kld"], found["ratio"], ci95)
    return RoundingStage(found["feedback"], tuple(found["plain"]), *numbers, outcome)


def rounding_folder(
    reference: Reference, imatrix: ImatrixStage, scheme: Scheme, text: Sequence[TokenSequence], feedback: str
) -> StageFolder:
    """Where the measurements lie; ``feedback``: the key of the rounding."""
    inputs = {
        "reference": reference.sha256,
        "imatrix": imatrix.sha256,
        "types": types_key(scheme.types),
        "text": fingerprint(text),
        "feedback": feedback,
        "revision": _REVISION,
    }
    return stage_folder("feedback", inputs)


def doubtful_kinds(types: Mapping[str, str], feedback: Feedback) -> list[str]:
    """The kinds that might be better off plain: those in which feedback takes little off the held-out output error,
    and embeddings, which are read as rows too where the output is tied to them."""
    ratios: dict[str, list[float]] = {}
    for name, type_name in types.items():
        if (choice := feedback.choice(name, type_name)).strength is not None:
            ratios.setdefault(kind_of(name), []).append(choice.ratio)
    return sorted(kind for kind, found in ratios.items() if kind == _EMBEDDING or np.mean(found) > _DOUBTFUL)


def best_rounding(
    bench: Measures, types: Mapping[str, str], doubtful: Sequence[str], narrate: Narrator
) -> dict[str, Any]:
    """Measure ``types`` plain, with feedback, and with each of the ``doubtful`` kinds plain; what is best, as plain
    data."""
    kinds = sorted({kind_of(name) for name in types})
    total = len(doubtful) + 3

    def measure(done: int, note: str, plain: Sequence[str]) -> Clusters:
        klds = bench.scheme(types, tensors_of(types, plain))
        found = Clusters(tuple(k * n for k, n in zip(klds, bench.weights, strict=True)), tuple(bench.weights))
        narrate(done, total, f"{note}: KLD {found.mean:.5f}")
        return found

    without = measure(1, "plain rounding", kinds)
    best, best_plain = measure(2, "feedback", []), tuple[str, ...]()
    # A kind is left plain only where that is better beyond chance: all of them are tried on the same text.
    worse = []
    for done, kind in enumerate(doubtful, start=3):
        ratio = paired_ratio(measure(done, f"{kind} plain", [kind]), best)
        if ratio is not None and ratio.ci95[1] < 1:
            worse.append(kind)
    if worse:
        some = measure(total, f"{' '.join(worse)} plain", worse)
        if some.mean < best.mean:
            best, best_plain = some, tuple(worse)
    narrate(total, total, "")
    if without.mean <= best.mean:
        best, best_plain = without, tuple(kinds)
    ratio = paired_ratio(best, without) or Ratio(1.0, (1.0, 1.0))
    return {
        "feedback": best is not without,
        "plain": list(best_plain),
        "kld": best.mean,
        "plain_kld": without.mean,
        "ratio": ratio.value,
        "ratio_ci95": list(ratio.ci95),
    }
