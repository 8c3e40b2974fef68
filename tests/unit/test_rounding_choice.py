"""Whether feedback is kept, and where: decided by what is measured, never for the worse."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from dynrun.allocation.rounding_choice import best_rounding, tensors_of

KINDS = ("attn_k", "attn_v", "ffn_up")
TYPES = {f"blk.{i}.{kind}.weight": "Q4_K" for i in range(2) for kind in KINDS}
QUIET = lambda *_: None  # noqa: E731


def everywhere(kld: float) -> dict[str, float]:
    return dict.fromkeys(KINDS, kld)


class Measured:
    """A model of which every kind has a KLD with feedback and one without, the same on all sequences but for noise."""

    def __init__(self, with_feedback: Mapping[str, float], plain: Mapping[str, float], noise: Sequence[float]) -> None:
        self.with_feedback, self.plain, self.noise = with_feedback, plain, noise
        self.asked: list[frozenset[str]] = []
        self.weights = [100, 50, 200, 80]

    def scheme(self, types: Mapping[str, str], plain: Collection[str] = ()) -> list[float]:
        self.asked.append(frozenset(plain))
        kinds = {kind: set(tensors_of(types, [kind])) <= set(plain) for kind in self.plain}
        total = sum(self.plain[kind] if is_plain else self.with_feedback[kind] for kind, is_plain in kinds.items())
        # Noise on whatever has a plain kind, so that a small difference is not certain.
        return [total * (1 + (noise if any(kinds.values()) else 0)) for noise in self.noise]


def test_feedback_that_helps_everywhere_is_kept_everywhere() -> None:
    model = Measured(everywhere(0.1), everywhere(0.2), [0, 0, 0, 0])
    found = best_rounding(model, TYPES, KINDS, QUIET)
    assert found["feedback"]
    assert found["plain"] == []
    assert (round(found["kld"], 9), round(found["plain_kld"], 9), round(found["ratio"], 9)) == (0.3, 0.6, 0.5)
    assert frozenset(TYPES) in model.asked
    assert frozenset() in model.asked


def test_a_kind_that_it_harms_is_rounded_plainly() -> None:
    model = Measured({"attn_k": 0.3, "attn_v": 0.1, "ffn_up": 0.1}, everywhere(0.2), [0, 0, 0, 0])
    found = best_rounding(model, TYPES, KINDS, QUIET)
    assert found["feedback"]
    assert found["plain"] == ["attn_k"]
    assert round(found["kld"], 9) == 0.4


def test_a_kind_that_it_harms_within_chance_keeps_it() -> None:
    model = Measured({"attn_k": 0.201, "attn_v": 0.1, "ffn_up": 0.1}, everywhere(0.2), [0.2, -0.2, -0.1, 0.3])
    assert best_rounding(model, TYPES, KINDS, QUIET)["plain"] == []


def test_a_file_that_it_harms_is_rounded_plainly() -> None:
    model = Measured(everywhere(0.3), everywhere(0.2), [0, 0, 0, 0])
    found = best_rounding(model, TYPES, KINDS, QUIET)
    assert not found["feedback"]
    assert found["kld"] == found["plain_kld"]
    assert found["ratio"] == 1


def test_only_doubtful_kinds_are_measured_by_themselves() -> None:
    model = Measured({"attn_k": 0.3, "attn_v": 0.1, "ffn_up": 0.1}, everywhere(0.2), [0, 0, 0, 0])
    found = best_rounding(model, TYPES, ["ffn_up"], QUIET)
    assert found["plain"] == []
    assert model.asked == [frozenset(TYPES), frozenset(), frozenset(tensors_of(TYPES, ["ffn_up"]))]


def test_what_is_measured_is_told_as_it_goes() -> None:
    model, told = Measured({"attn_k": 0.3, "attn_v": 0.3, "ffn_up": 0.1}, everywhere(0.2), [0, 0, 0, 0]), []
    best_rounding(model, TYPES, ("attn_k", "attn_v"), lambda *progress: told.append(progress))
    assert [(done, total) for done, total, _ in told] == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5), (5, 5)]
    notes = [note.split(":")[0] for _, _, note in told]
    assert notes == ["plain rounding", "feedback", "attn_k plain", "attn_v plain", "attn_k attn_v plain", ""]
    assert told[0][2] == "plain rounding: KLD 0.60000"
