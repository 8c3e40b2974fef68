"""What is probed together."""

from __future__ import annotations

import pytest

from dynrun.errors import UsageError
from dynrun.gguf.tensor_types import DEFAULT_MENU, TENSOR_TYPES
from dynrun.sensitivity.units import check_group, probe_types, units

NARROW = [name for name in DEFAULT_MENU if TENSOR_TYPES[name].fits(96)]
SHAPES = {f"blk.{i}.{kind}.weight": DEFAULT_MENU for i in range(16) for kind in ("attn_q", "ffn_up")} | {
    "output.weight": DEFAULT_MENU,
    "token_embd.weight": NARROW,
}
ALIKE = dict.fromkeys(SHAPES, 1.0)


def test_without_a_group_every_tensor_is_alone() -> None:
    found = units(SHAPES, "", ALIKE)
    assert [unit.name for unit in found] == list(SHAPES)
    assert found[0].types == tuple({"blk.0.attn_q.weight": t} for t in ("IQ3_S", "Q5_K", "IQ2_S"))


def test_rows_that_k_quants_do_not_fit_are_probed_in_types_of_32_columns() -> None:
    assert probe_types(NARROW) == ("IQ4_NL", "Q5_0")


def test_without_codebook_types_others_of_these_bits_are_probed() -> None:
    assert probe_types(["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16"]) == ("Q3_K", "Q5_K", "Q2_K")


def test_a_tensor_that_can_only_be_of_full_precision_is_not_probed() -> None:
    assert probe_types(["F16"]) == ()
    assert [unit.name for unit in units({"a": ["F16"], "b": ["Q8_0", "F16"]}, "", {"b": 1.0})] == ["b"]


@pytest.mark.parametrize(("group", "n_groups"), [("kind", 2), ("kind:4", 8), ("kind:5", 8), ("kind:depth", 16)])
def test_groups_hold_one_kind_in_neighbouring_layers(group: str, n_groups: int) -> None:
    found = units(SHAPES, group, ALIKE)
    # The two tensors outside the blocks stay alone.
    assert len(found) == n_groups + 2
    for unit in found:
        kinds = {name.split(".", 2)[-1] for name in unit.types[0]}
        layers = sorted(int(name.split(".")[1]) for name in unit.types[0] if name.startswith("blk."))
        assert len(kinds) == 1
        assert layers == list(range(layers[0], layers[-1] + 1)) if layers else len(unit.types[0]) == 1
    assert sorted(name for unit in found for name in unit.types[0]) == sorted(SHAPES)


def test_a_tensor_with_massive_inputs_is_measured_alone() -> None:
    names = [f"blk.{i}.ffn_down.weight" for i in range(8)]
    energy = {name: 100.0 + i for i, name in enumerate(names)} | {names[5]: 1e6, names[2]: 1.0}
    found = units(dict.fromkeys(names, DEFAULT_MENU), "kind:4", energy)
    assert [sorted(unit.types[0]) for unit in found] == [
        [names[0], names[1], names[3]],
        [names[2]],
        [names[4], names[6], names[7]],
        [names[5]],
    ]
    assert len({unit.name for unit in found}) == 4
    assert len(units(dict.fromkeys(names, DEFAULT_MENU), "kind:2", energy)) == 6
    assert len(units(dict.fromkeys(names, DEFAULT_MENU), "kind", dict.fromkeys(names, 0.0))) == 1


@pytest.mark.parametrize("group", ["layers", "kind:0", "kind:", "kind:x", "kind:-1"])
def test_another_group_is_an_error_that_says_what_there_is(group: str) -> None:
    with pytest.raises(UsageError, match="probe group"):
        check_group(group)
