"""The curve over all sizes: what is on it, and how it is drawn."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from dynrun.allocation.constraints import Constraints, parse_rule
from dynrun.allocation.curve import Curve, draw, trace
from dynrun.allocation.speed import SpeedTable
from dynrun.errors import UsageError
from dynrun.gguf.layout import tensor_bytes
from dynrun.gguf.quantizable import quantizable
from dynrun.models import Reference
from tests.pricing import K_MENU, reference_of, stage_of, table_of
from tests.tiny import write_tiny_llama

FIXED = 5000
Presets = list[tuple[str, int, dict[str, str]]]


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    return reference_of(write_tiny_llama(tmp_path / "tiny$.gguf", n_block=3))


def uniform(reference: Reference, type_name: str) -> tuple[str, int, dict[str, str]]:
    """A preset that gives every tensor the same type."""
    tensors = quantizable(reference.header)
    size = FIXED + sum(tensor_bytes(t, type_name) for t in tensors.values())
    return f"ALL_{type_name}", size, dict.fromkeys(tensors, type_name)


def curve_of(reference: Reference, tmp_path: Path, n_points: int = 30, rules: tuple[str, ...] = ()) -> Curve:
    presets = [uniform(reference, t) for t in ("Q4_K", "Q2_K", "IQ3_S", "IQ1_S")]
    constraints = Constraints(tuple(parse_rule("pin", text) for text in rules))
    return trace(reference, stage_of(tmp_path), table_of(reference), FIXED, presets, constraints, n_points)


def test_it_goes_from_the_smallest_file_to_q8_0_and_never_rises(reference: Reference, tmp_path: Path) -> None:
    curve = curve_of(reference, tmp_path)
    sizes, klds = [row.size_bytes for row in curve.rows], [row.predicted_kld for row in curve.rows]
    assert len(sizes) == 30
    assert (sizes[0], sizes[-1]) == (uniform(reference, "Q2_K")[1], uniform(reference, "Q8_0")[1])
    assert klds == sorted(klds, reverse=True)
    assert klds[0] > klds[-1] > 0
    assert curve.rows[3].bpw == pytest.approx(sizes[3] * 8 / reference.header.n_elements)


def test_no_stock_preset_is_below_it(reference: Reference, tmp_path: Path) -> None:
    curve = curve_of(reference, tmp_path)
    assert [preset.ftype for preset in curve.presets] == ["ALL_IQ1_S", "ALL_Q2_K", "ALL_IQ3_S", "ALL_Q4_K"]
    table = table_of(reference)
    priced = {preset.ftype: preset for preset in curve.presets}
    for name in ("Q2_K", "Q4_K"):
        preset = priced[f"ALL_{name}"]
        assert preset.predicted_kld == pytest.approx(math.fsum(row.price(name) for row in table.values()))
        assert preset.ours_predicted_kld is not None
        assert preset.ours_predicted_kld <= preset.predicted_kld * (1 + 1e-4)
        assert not preset.estimated
    assert priced["ALL_Q4_K"].ours_predicted_kld < 0.9 * priced["ALL_Q4_K"].predicted_kld


def test_presets_outside_the_table_are_estimated_and_too_small_ones_have_no_equal(
    reference: Reference, tmp_path: Path
) -> None:
    smallest, _, third, _ = curve_of(reference, tmp_path).presets
    assert (smallest.ftype, smallest.ours_predicted_kld, smallest.estimated) == ("ALL_IQ1_S", None, True)
    assert third.estimated
    # IQ3_S has the bits of Q3_K.
    table = table_of(reference)
    assert third.predicted_kld == pytest.approx(math.fsum(row.price("Q3_K") for row in table.values()))


def test_the_curve_obeys_rules(reference: Reference, tmp_path: Path) -> None:
    free, pinned = curve_of(reference, tmp_path), curve_of(reference, tmp_path, rules=("output=Q8_0",))
    assert pinned.rows[0].size_bytes > free.rows[0].size_bytes
    assert pinned.rows[-1].predicted_kld == pytest.approx(free.rows[-1].predicted_kld)


def test_a_menu_that_ends_early_ends_the_curve(reference: Reference, tmp_path: Path) -> None:
    curve = trace(reference, stage_of(tmp_path), table_of(reference, K_MENU[:2]), FIXED, [], n_points=5)
    assert curve.rows[-1].size_bytes == uniform(reference, "Q3_K")[1]
    single = trace(reference, stage_of(tmp_path), table_of(reference, ["Q4_K"]), FIXED, [], n_points=5)
    assert [row.size_bytes for row in single.rows] == [uniform(reference, "Q4_K")[1]]


def test_a_speed_has_no_place_on_it(reference: Reference, tmp_path: Path) -> None:
    constraints = Constraints((), SpeedTable("t", {}, {}), 1.0)
    with pytest.raises(UsageError, match="--min-speed"):
        trace(reference, stage_of(tmp_path), table_of(reference), FIXED, [], constraints)


def test_it_is_drawn_whole_or_not_at_all(reference: Reference, tmp_path: Path) -> None:
    curve = curve_of(reference, tmp_path, n_points=6)
    path = tmp_path / "made" / "curve.png"
    draw(curve, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["curve.png"]
    # Nothing left to lose is no logarithm.
    draw(replace(curve, rows=tuple(replace(row, predicted_kld=0.0) for row in curve.rows), presets=()), path)
    assert path.read_bytes().startswith(b"\x89PNG")
