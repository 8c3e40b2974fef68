"""Options of several commands: sizes, menus, constraints, and how they reach a command."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dynrun.cli import options
from dynrun.errors import NotFoundError, UsageError
from dynrun.gguf.tensor_types import DEFAULT_MENU, MENUS, TENSOR_TYPES, WEIGHT_TYPES, parse_menu, substitutes
from dynrun.target import Target
from tests.commands import dynrun


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("92000000", 92_000_000),
        ("92000000B", 92_000_000),
        ("250M", 250_000_000),
        ("250MB", 250_000_000),
        ("1.5G", 1_500_000_000),
        ("1.5 GB", 1_500_000_000),
        ("240MiB", 240 * 2**20),
        ("0.5gib", 2**29),
        ("12kb", 12_000),
        ("1.000000001TB", 1_000_000_001_000),
        ("9007199254740993", 9_007_199_254_740_993),
    ],
)
def test_sizes(text: str, n: int) -> None:
    assert options.size_bytes(text) == n


@pytest.mark.parametrize("text", ["", "many", "-5M", "1.5.2G", "5XB", "1e9", "M", "٣M", "250 M B"])
def test_what_is_no_size_says_how_one_is_written(text: str) -> None:
    with pytest.raises(UsageError, match="MiB"):
        options.size_bytes(text)


@pytest.mark.parametrize("bpw", [0.0, -1.0, math.nan, math.inf])
def test_impossible_bits_per_weight_are_refused(bpw: float) -> None:
    with pytest.raises(UsageError, match="positive --bpw"):
        Target(bpw=bpw)


def test_menus_by_name() -> None:
    assert parse_menu("all") == DEFAULT_MENU == MENUS["all"]
    assert set(MENUS["new"]) - set(DEFAULT_MENU) == {"MXFP4", "NVFP4", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0"}
    assert not [name for name in MENUS["k"] if name.startswith("IQ")]
    assert parse_menu(" K ") == MENUS["k"]
    assert set(MENUS["arm"]) == {"Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
    for menu in MENUS.values():
        bits = [TENSOR_TYPES[name].bpw for name in menu]
        assert bits == sorted(bits)


def test_a_list_of_types_is_a_menu_whatever_its_order() -> None:
    assert parse_menu("q8_0, Q4_K,Q6_K,q4_k") == ("Q4_K", "Q6_K", "Q8_0") == parse_menu("Q4_K,Q6_K,Q8_0")
    assert parse_menu("Q4_K") == ("Q4_K",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        *(("", "names no type"), (",", "names no type"), ("arn", "nearest is arm"), ("Q4_M", "the nearest is Q4_")),
        *(("Q4_K,Q7_K", "the nearest is Q"), ("I32,Q4_K", "unknown tensor type")),
    ],
)
def test_a_menu_that_is_none_names_the_nearest(text: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_menu(text)
    assert says in str(error.value)


def test_a_tensor_that_no_type_of_the_menu_fits_gets_the_next_finer_that_does() -> None:
    narrow = [name for name in DEFAULT_MENU if TENSOR_TYPES[name].fits(576)]
    assert substitutes(("Q4_K", "Q6_K"), narrow) == ["Q4_0", "Q8_0"]
    assert substitutes(("IQ2_XXS", "Q2_K"), narrow) == ["Q4_0"]
    assert substitutes(("Q4_K",), [name for name in WEIGHT_TYPES if TENSOR_TYPES[name].fits(33)]) == ["BF16"]
    assert substitutes(("Q4_K",), ["F16"]) == ["F16"]
    assert substitutes(("F16",), ["Q8_0"]) == ["Q8_0"]
    assert substitutes(("Q4_K",), []) == []


def test_constraints_out_of_the_options(tmp_path: Path) -> None:
    table = tmp_path / "speeds.toml"
    table.write_text("[ns_per_weight]\nQ4_K = 0.5\n")
    found = options.constraints(["token_embd=q6_k"], ["attn_v=Q5_K", "ffn=Q2_K"], ["ffn=Q6_K"], table, 0.9)
    assert [str(rule) for rule in found.rules] == [
        "--pin 'token_embd=Q6_K'",
        "--min 'attn_v=Q5_K'",
        "--min 'ffn=Q2_K'",
        "--max 'ffn=Q6_K'",
    ]
    assert found.min_speed == 0.9
    assert not options.constraints().rules
    with pytest.raises(NotFoundError):
        options.constraints(speed_table=tmp_path / "none.toml", min_speed=1.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--curve", "--bpw", "4"), "--curve is of all sizes"),
        (("--bpw", "4", "--min-speed", "0.9"), "give --speed-table"),
        (("--bpw", "4", "--pin", "attn_v"), "is no rule"),
        (("--bpw", "4", "--types", "arn"), "the nearest is arm"),
        (("--size", "4 apples"), "is no size"),
        ((), "exactly one of --quant, --bpw and --size"),
    ],
)
def test_allocate_refuses_at_once_what_makes_no_sense(arguments: tuple[str, ...], says: str) -> None:
    # The model is never looked at.
    ran = dynrun("allocate", "no-such-model.gguf", *arguments)
    assert ran.exit_code == 2
    assert says in ran.error
