"""A known scheme on a model: when its types stay, and what its slopes say of other weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dynrun.allocation.constraints import NO_CONSTRAINTS, Constraints, parse_rule
from dynrun.allocation.speed import SpeedTable
from dynrun.allocation.transfer import follows, stands, with_slopes
from dynrun.calibration.stage import ImatrixStage
from dynrun.choose import adopted
from dynrun.errors import DoesNotFitError, UsageError
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.tensor_types import DEFAULT_MENU
from dynrun.models import Reference
from dynrun.scheme import Scheme
from dynrun.sensitivity.stage import TensorSensitivity
from tests.pricing import K_MENU, reference_of, stage_of
from tests.tiny import write_tiny_llama

POINTS = ((0.01, 0.02), (0.1, 0.4))


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    return reference_of(write_tiny_llama(tmp_path / "tiny.gguf", n_block=1))


@pytest.fixture
def imatrix(tmp_path: Path) -> ImatrixStage:
    return stage_of(tmp_path)


@pytest.fixture
def scheme(reference: Reference) -> Scheme:
    """Of this model, for 1,000 bytes."""
    names = list(quantizable(reference.header))
    types, slopes = dict.fromkeys(names, "Q4_K"), dict.fromkeys(names, POINTS)
    return Scheme(types, "mine", source_sha256=reference.sha256, budget_bytes=1000, slopes=slopes)


def test_a_price_is_the_slope_at_the_models_own_error_times_that_error() -> None:
    table = {name: TensorSensitivity(None, {"Q4_K": 0.005, "Q2_K": 0.2}) for name in ("a", "b")}
    priced = with_slopes(table, {"a": POINTS})
    assert priced["a"].price("Q4_K") == pytest.approx(2.0 * 0.005)
    assert priced["a"].price("Q2_K") == pytest.approx(4.0 * 0.2)
    # Never measured, like the blocks that no evaluation runs: the error alone decides.
    assert priced["b"].price("Q2_K") == 0.2


@pytest.mark.parametrize(
    ("size", "limit", "stays"),
    [(990, None, True), (990, 1000, True), (990, 990, True), (990, 989, False), (990, 1001, False)],
)
def test_of_its_own_model_it_stays_for_the_budgets_that_it_is_the_best_for(
    reference: Reference, scheme: Scheme, size: int, limit: int | None, stays: bool
) -> None:
    assert stands(scheme, reference, size, limit, obeys=True) is stays
    assert not stands(scheme, reference, size, limit, obeys=False)


def test_of_another_model_it_is_solved_again(reference: Reference, scheme: Scheme) -> None:
    assert not stands(replace(scheme, source_sha256="0" * 64), reference, 990, None, obeys=True)


def test_without_slopes_it_stays_wherever_it_is_from(reference: Reference, scheme: Scheme) -> None:
    by_hand = replace(scheme, slopes={}, source_sha256="")
    assert stands(by_hand, reference, 990, None, obeys=True)
    assert stands(by_hand, reference, 990, 5000, obeys=True)
    with pytest.raises(DoesNotFitError, match="990 bytes, more than the 900 that are wanted"):
        stands(by_hand, reference, 990, 900, obeys=True)
    with pytest.raises(UsageError, match="change its types by hand"):
        stands(by_hand, reference, 990, None, obeys=False)


def test_rules_and_menus_are_wishes_that_a_scheme_may_meet(
    reference: Reference, imatrix: ImatrixStage, scheme: Scheme
) -> None:
    def obeys(menu: tuple[str, ...], *rules: str) -> bool:
        wanted = Constraints(tuple(parse_rule("pin", rule) for rule in rules))
        return follows(reference, imatrix, scheme, menu, wanted)

    assert obeys(K_MENU)
    assert not obeys(("Q5_K", "Q6_K"))
    assert obeys(K_MENU, "attn_q=Q4_K")
    assert not obeys(K_MENU, "attn_q=Q6_K")
    assert obeys(("Q5_K", "Q6_K"), ".=Q4_K")
    mixed = replace(scheme, types={**scheme.types, "output.weight": "MXFP4"})
    assert follows(reference, imatrix, mixed, DEFAULT_MENU, NO_CONSTRAINTS)
    assert not follows(reference, imatrix, mixed, K_MENU, NO_CONSTRAINTS)
    with pytest.raises(UsageError, match="matches no tensor"):
        obeys(K_MENU, "attn_qq=Q4_K")


def test_a_wanted_speed_is_never_met_unseen(reference: Reference, imatrix: ImatrixStage, scheme: Scheme) -> None:
    fast = Constraints((), SpeedTable("t.toml", {"Q4_K": 1e-9}, {}), 0.5)
    assert not follows(reference, imatrix, scheme, DEFAULT_MENU, fast)


def test_a_scheme_of_other_tensors_is_refused_by_the_first(reference: Reference, scheme: Scheme) -> None:
    short = Scheme({"output.weight": "Q6_K"}, "short", rules={"default": "Q4_K"})
    assert adopted(short, reference).types == dict.fromkeys(scheme.types, "Q4_K") | {"output.weight": "Q6_K"}
    with pytest.raises(UsageError, match=r"gives no type to blk\.0\.attn_k\.weight"):
        adopted(Scheme({"output.weight": "Q6_K"}, "short"), reference)
    with pytest.raises(UsageError, match=r"names blk\.7\.attn_q\.weight, which the model has not"):
        adopted(replace(scheme, types={**scheme.types, "blk.7.attn_q.weight": "Q4_K"}), reference)
    with pytest.raises(UsageError, match=r"slope of blk\.7\.attn_q\.weight"):
        adopted(replace(scheme, slopes={"blk.7.attn_q.weight": POINTS}), reference)
    with pytest.raises(UsageError, match="is a llama model and the scheme is for qwen2"):
        adopted(replace(scheme, architecture="qwen2"), reference)
