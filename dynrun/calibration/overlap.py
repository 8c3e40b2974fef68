"""Near-duplicates across splits, found by their n-grams: what is proven or probed on is not calibrated on.

Takes conversations, gives those to keep. Compares what is said; system prompts and tools are left out, which many
conversations share without being alike. Finds no paraphrases and no translations.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dynrun.artifacts import sha256_bytes
from dynrun.calibration.conversation import Conversation
from dynrun.calibration.dataset import Source, builtin
from dynrun.calibration.splits import split_of_source

Grams = npt.NDArray[np.uint64]

# Words, and single characters of scripts without spaces: CJK, kana, Thai, Lao, Khmer, Burmese, Tibetan.
_NO_SPACES = "\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
_UNIT = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+")
N_GRAM, N_GRAM_SHORT = 13, 5
# Texts of fewer units count as short, and are compared with those of up to twice as many.
_SHORT = 4 * N_GRAM
THRESHOLD, THRESHOLD_SHORT = 0.3, 0.5
# A shorter text counts as if it had so many: less than about 27 words in common are a quotation.
_LEAST_GRAMS = 50
# An n-gram in so many conversations, and in such a share of them, is a form that they are all written in.
_FORM, _FORM_SHARE = 20, 0.02


def drop_near_duplicates(
    calibration: Iterable[Conversation], held_out: Iterable[Conversation]
) -> tuple[list[Conversation], list[str]]:
    """The conversations of ``calibration`` that are not too much like one of ``held_out``, and the ids of the others.

    Two texts are near-duplicates where they share 30% of the n-grams of the shorter one. n = 13 words is what checks
    for contamination use (Brown et al. 2020, arXiv:2005.14165, appendix C): by chance even one such is hardly ever
    shared. Those checks drop a text for one n-gram, as they look for benchmark questions; conversations legitimately
    share a quotation, a licence or a stock phrase, so a third of the text must be the same words. Of an edited copy,
    where every 30th word is another, 13 in 30 n-grams are gone and it is still found. Texts of fewer than 52 words
    lose too many n-grams to one changed word: among each other they are compared by 5-grams, and half of these must
    be shared. In scripts without spaces a character counts as a word (13 of them are about eight words). n-grams that
    more than 2% of all conversations have count for nothing: the same form around every question is no duplicate, and
    what is a whole copy is dropped by the hash of all it says.
    """
    ours, theirs = list(calibration), list(held_out)
    if not ours or not theirs:
        return ours, []
    mine, held = [_units(one) for one in ours], [_units(one) for one in theirs]
    whole = {units.tobytes() for units in held if len(units)}
    found = np.array([len(units) > 0 and units.tobytes() in whole for units in mine])
    found |= _alike(mine, held, n=N_GRAM, threshold=THRESHOLD, least=_LEAST_GRAMS)
    short = np.array([len(units) < _SHORT for units in mine])
    few = [units for units in held if len(units) < 2 * _SHORT]
    found[short] |= _alike(
        [units for units in mine if len(units) < _SHORT], few, n=N_GRAM_SHORT, threshold=THRESHOLD_SHORT, least=1
    )
    kept = [one for one, drop in zip(ours, found, strict=True) if not drop]
    return kept, [one.id for one, drop in zip(ours, found, strict=True) if drop]


def calibration_pool(sources: Sequence[Source]) -> list[Source]:
    """The same sources, each with its ``near_duplicates`` noted, so that their splits share no text.

    Out of the calibration parts goes what is like the shipped set's probe or test part or any source's probe part, out
    of the probe parts what is like the shipped test part: whether or not the shipped set is among the sources.
    """
    shipped = builtin()
    test = split_of_source(shipped, "test")
    probes: list[Conversation] = []
    # By name: the shipped set counts once.
    for source in {one.name: one for one in (shipped, *sources)}.values():
        probes += split_of_source(source, "probe")
    pool = []
    for source in sources:
        _, of_calibration = drop_near_duplicates(split_of_source(source, "calibration"), [*test, *probes])
        _, of_probe = drop_near_duplicates(split_of_source(source, "probe"), test)
        noted = source.near_duplicates.union(of_calibration, of_probe)
        pool.append(replace(source, near_duplicates=noted))
    return pool


def _units(conversation: Conversation) -> npt.NDArray[np.uint32]:
    """What is said as numbers, one a word or character."""
    said = [conversation.text] if conversation.text else _said(conversation)
    words = _UNIT.findall("\n".join(said).lower())
    return np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in words], np.uint32)


def _said(conversation: Conversation) -> list[str]:
    messages = [m for m in conversation.messages if m["role"] != "system"]
    return [str(m.get(key) or "") for m in messages for key in ("reasoning_content", "content")]


def _grams(units: npt.NDArray[np.uint32], n: int) -> Grams:
    """The different n-grams of a text, hashed."""
    if len(units) < n:
        return np.zeros(0, np.uint64)
    weights = np.array([int(sha256_bytes(str(i).encode())[:16], 16) | 1 for i in range(n)], np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(units.astype(np.uint64), n)
    return np.unique(windows @ weights)


@dataclass(frozen=True)
class _Index:
    """The n-grams of held-out texts: ``grams``, sorted, and of each the texts that have it, from ``starts`` on."""

    grams: Grams
    starts: npt.NDArray[np.int64]
    texts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, held: Sequence[Grams]) -> _Index:
        every = np.concatenate(held) if held else np.zeros(0, np.uint64)
        owners = np.repeat(np.arange(len(held)), [len(grams) for grams in held])
        order = np.argsort(every, kind="stable")
        grams, starts = np.unique(every[order], return_index=True)
        return cls(grams, np.append(starts, len(every)), owners[order])

    def places(self, grams: Grams) -> npt.NDArray[np.int64]:
        """Which of ``grams`` are here, as positions."""
        at = np.minimum(np.searchsorted(self.grams, grams), len(self.grams) - 1).astype(np.int64)
        found: npt.NDArray[np.int64] = at[self.grams[at] == grams]
        return found

    def shared(self, places: npt.NDArray[np.int64], n_texts: int) -> npt.NDArray[np.int64]:
        """How many of the n-grams at ``places`` each text has."""
        counts = self.starts[places + 1] - self.starts[places]
        first = np.repeat(self.starts[places] - np.cumsum(counts) + counts, counts)
        return np.bincount(self.texts[first + np.arange(counts.sum())], minlength=n_texts)


def _alike(
    mine: Sequence[npt.NDArray[np.uint32]],
    held: Sequence[npt.NDArray[np.uint32]],
    *,
    n: int,
    threshold: float,
    least: int,
) -> npt.NDArray[np.bool_]:
    """Of each of ``mine`` whether it shares ``threshold`` of the n-grams of the shorter with one of ``held``."""
    of_held = [_grams(units, n) for units in held]
    index = _Index.of(of_held)
    result = np.zeros(len(mine), np.bool_)
    if not len(index.grams):
        return result
    totals, places = [], []
    seen = np.diff(index.starts)
    for units in mine:
        grams = _grams(units, n)
        totals.append(len(grams))
        places.append(index.places(grams))
        seen[places[-1]] += 1
    form = seen > max(_FORM, _FORM_SHARE * (len(mine) + len(held)))
    of_form = index.shared(np.flatnonzero(form), len(held))
    sizes = np.maximum(np.array([len(grams) for grams in of_held]) - of_form, least)
    for i, at in enumerate(places):
        own = at[~form[at]]
        if len(own):
            size = max(totals[i] - (len(at) - len(own)), 1)
            result[i] = np.any(index.shared(own, len(held)) >= threshold * np.minimum(sizes, size))
    return result
