"""What feedback gives, as the allocator is told: ratios for all types of all tensors from a few that are measured."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

from dynrun.calibration.imatrix import read_imatrix
from dynrun.gguf.quantizable import candidate_types, quantizable
from dynrun.rounding.gains import gains
from tests.native.test_feedback_store import CHOICES, collected

pytestmark = pytest.mark.native


def test_gains_are_ratios_for_all_types_of_all_tensors_the_layers_between_interpolated(tmp_path: Path) -> None:
    # Rows of 64 cannot have types of 256.
    model = collected(tmp_path, n_block=6, n_embd=64, n_ff=64)
    entries, menu = read_imatrix(model.imatrix.path).sums, ("Q4_0", "Q4_K", "Q5_0", "Q5_1", "IQ4_NL", "F16")
    kinds = ("attn_k.weight", "ffn_down.weight", "token_embd.weight")
    candidates = {
        name: candidate_types(one, menu, entries, {})
        for name, one in quantizable(model.reference.header).items()
        if name.endswith(kinds)
    }
    told: list[tuple[int, int]] = []
    with model.open() as feedback:
        found = gains(feedback, candidates, lambda done, total: told.append((done, total)))
        lines = (feedback.folder / CHOICES).read_text().splitlines()
        measured = {json.loads(line)[0] for line in lines}
        for name in measured:
            assert found[name]["Q4_0"] == pytest.approx(feedback.choice(name, "Q4_0").ratio)
    total = told[-1][1]
    assert told == [(done, total) for done in range(1, total + 1)]
    assert {name: list(types) for name, types in found.items()} == candidates
    assert all(0 < ratio <= 1 for types in found.values() for ratio in types.values())
    assert not any("Q4_K" in types for types in found.values())
    assert set(found["token_embd.weight"].values()) == {1.0}
    assert {types["F16"] for types in found.values()} == {1.0}
    for kind in kinds[:2]:
        check_layers(found, measured, kind)
    assert found["blk.0.attn_k.weight"]["Q4_0"] < 1


def check_layers(found: Mapping[str, Mapping[str, float]], measured: Collection[str], kind: str) -> None:
    """First and last are measured; others lie between the nearest measured ones; types of one kind have one ratio."""
    known = [layer for layer in range(6) if f"blk.{layer}.{kind}" in measured]
    assert known[0] == 0
    assert known[-1] == 5
    assert len(known) < 6
    for layer in range(6):
        ratios = found[f"blk.{layer}.{kind}"]
        assert ratios["Q5_1"] == ratios["Q5_0"]
        below, above = max(k for k in known if k <= layer), min(k for k in known if k >= layer)
        for type_name in ("Q4_0", "Q5_0", "IQ4_NL"):
            ends = [found[f"blk.{end}.{kind}"][type_name] for end in (below, above)]
            assert min(ends) * (1 - 1e-9) <= ratios[type_name] <= max(ends) * (1 + 1e-9)
