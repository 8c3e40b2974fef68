"""Rules on tensors and on speed: what is read from the command line, and which types they leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynrun.allocation.constraints import Constraints, allowed, check_patterns, nearest_type, parse_rule
from dynrun.allocation.solve import solve
from dynrun.allocation.speed import SpeedTable, check_kinds, read_speed_table, seconds_per_token
from dynrun.allocation.stage import Budget, choose, options_for
from dynrun.calibration.stage import ImatrixStage
from dynrun.errors import DoesNotFitError, DynrunError, NotFoundError, UsageError
from dynrun.gguf.header import TensorInfo, read_header
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.tensor_types import MENUS, TENSOR_TYPES, WEIGHT_TYPES
from dynrun.models import Reference
from tests.pricing import K_MENU, Row, reference_of, stage_of, table_of
from tests.tiny import write_tiny_llama

NAMES = ("token_embd.weight", "blk.0.attn_v.weight", "blk.1.attn_v.weight", "blk.1.ffn_down.weight")


def tensor(name: str = "blk.0.attn_v.weight", n_columns: int = 768) -> TensorInfo:
    return TensorInfo(name, "F16", (n_columns, 256), 0, n_columns * 512)


def ruled(*rules: str) -> Constraints:
    """Rules written as on the command line: ``pin attn_v=Q6_K``."""
    words = (rule.split(maxsplit=1) for rule in rules)
    return Constraints(tuple(parse_rule(kind, text) for kind, text in words))  # type: ignore[arg-type]


def test_a_rule_is_a_regular_expression_and_a_type_in_any_case() -> None:
    rule = parse_rule("pin", r"blk\.[01]\.attn_(q|k)=q6_k")
    assert (rule.pattern, rule.type) == (r"blk\.[01]\.attn_(q|k)", "Q6_K")
    assert rule.matches("blk.1.attn_k.weight")
    assert not rule.matches("blk.2.attn_k.weight")
    assert parse_rule("max", "a=b=Q8_0").pattern == "a=b"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("attn_v", "is no rule"),
        ("=Q4_K", "is no rule"),
        ("attn_v=Q7_K", "the nearest is Q"),
        ("attn_v=", "unknown tensor type"),
        ("attn_v=I32", "unknown tensor type"),
        ("attn_(v=Q4_K", "no regular expression"),
    ],
)
def test_what_is_no_rule_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_rule("min", text)
    assert says in str(error.value)
    assert "--min" in str(error.value)


def test_a_pattern_that_matches_nothing_names_the_nearest_kind() -> None:
    check_patterns([parse_rule("pin", "attn_v=Q6_K"), parse_rule("min", "token_embd=Q4_K")], NAMES)
    with pytest.raises(UsageError, match=r"'attn_vv=Q6_K' matches no tensor .* the nearest is 'attn_v'"):
        check_patterns([parse_rule("pin", "attn_vv=Q6_K")], NAMES)


def test_rules_bound_bits_and_a_pin_need_not_be_in_the_menu() -> None:
    menu = MENUS["k"]
    assert allowed(tensor(), menu, ruled("min attn_v=Q5_0")) == ["Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0", "F16"]
    assert allowed(tensor(), menu, ruled("max attn_v=Q3_K")) == ["Q2_K", "Q3_K"]
    assert allowed(tensor(), menu, ruled("min v=Q3_K", "min v=Q4_K", "max v=Q4_1")) == ["Q4_0", "Q4_K", "Q4_1"]
    assert allowed(tensor(), menu, ruled("pin attn_v=IQ3_S", "min attn_v=Q2_K")) == ["IQ3_S"]
    assert allowed(tensor(), menu, ruled("pin ffn=IQ3_S")) == list(menu)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        (("pin v=Q4_K", "pin attn=Q5_K"), "contradict each other"),
        (("min v=Q6_K", "max v=Q4_K"), "contradict each other"),
        (("pin v=Q2_K", "min v=Q4_K"), "write Q4_K as Q2_K"),
        (("pin v=Q8_0", "max v=Q4_K"), "contradict each other"),
        (("min v=IQ3_XXS", "max v=IQ3_XXS"), "add IQ3_XXS to --types, or ask for"),
    ],
)
def test_rules_that_leave_nothing_name_a_possible_wish(rules: tuple[str, ...], says: str) -> None:
    with pytest.raises(UsageError) as error:
        allowed(tensor(), MENUS["k"], ruled(*rules))
    assert says in str(error.value)
    assert "blk.0.attn_v.weight" in str(error.value)


def test_a_type_that_does_not_fit_the_rows_is_refused_with_the_nearest_that_does() -> None:
    with pytest.raises(UsageError, match=r"cannot be Q4_K: .* 576 .* 256 — the nearest possible is IQ4_NL"):
        allowed(tensor(n_columns=576), MENUS["arm"], ruled("pin attn_v=Q4_K"))
    with pytest.raises(UsageError, match="can have no such type — the nearest possible is F16"):
        allowed(tensor(n_columns=33), ["F16"], ruled("max attn_v=Q8_0"))


def test_speed_needs_both_the_table_and_the_ratio() -> None:
    table = SpeedTable("speeds.toml", {"Q4_K": 1e-11}, {})
    for speed, ratio in ((None, 0.9), (table, None), (table, 0.0), (table, float("nan")), (table, float("inf"))):
        with pytest.raises(UsageError):
            Constraints((), speed, ratio)
    assert Constraints((), table, 0.9).min_speed == 0.9


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_speed_table_is_nanoseconds_by_type_and_kind(tmp_path: Path) -> None:
    text = "[ns_per_weight]\nq4_k = 0.5\nQ8_0 = 1\n[ns_per_weight.ffn_down]\nQ4_K = 0.75\n"
    table = read_speed_table(write(tmp_path / "speeds.toml", text))
    assert table.seconds_per_weight("blk.3.attn_v.weight", "Q4_K") == pytest.approx(0.5e-9)
    assert table.seconds_per_weight("blk.3.ffn_down.weight", "Q4_K") == pytest.approx(0.75e-9)
    assert table.seconds_per_weight("blk.3.ffn_down.weight", "Q8_0") == pytest.approx(1e-9)
    with pytest.raises(UsageError, match=r"speeds.toml says nothing of Q6_K, .*--types"):
        table.seconds_per_weight("output.weight", "Q6_K")


@pytest.mark.parametrize(
    "text",
    [
        *("", "[ns]\nQ4_K = 1", "ns_per_weight = 1", "[ns_per_weight]\nQ4_K = -1", "[ns_per_weight]\nQ4_K = nan"),
        *(
            "[ns_per_weight]\nQ4_K = true",
            "[ns_per_weight]\nQ4_X = 1",
            "[ns_per_weight]\nQ4_K = 1\nq4_k = 2",
            "x =",
            "\xff",
        ),
    ],
)
def test_a_speed_table_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "speeds.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"speeds\.toml") as error:
        read_speed_table(path)
    assert "\n" not in str(error.value).replace("\nq4_k", "")


def test_no_speed_table_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_speed_table(tmp_path / "none.toml")


@pytest.mark.parametrize("tied", [False, True])
def test_only_weights_that_a_token_uses_take_time(tmp_path: Path, tied: bool) -> None:
    path = write_tiny_llama(tmp_path / "moe.gguf", n_expert=8, n_expert_used=2, tied=tied)
    header = read_header(path)
    table = SpeedTable("t", {"Q4_K": 1e-9}, {})
    times = {n: seconds_per_token(table, t, "Q4_K", header) for n, t in quantizable(header).items()}
    assert times["blk.0.attn_q.weight"] == pytest.approx(256 * 256 * 1e-9)
    assert times["blk.0.ffn_up_exps.weight"] == pytest.approx(256 * 512 * 8 * 2 / 8 * 1e-9)
    assert times["token_embd.weight"] == pytest.approx(320 * 256 * 1e-9 if tied else 0.0)


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Reference, ImatrixStage]:
    reference = reference_of(write_tiny_llama(tmp_path / "tiny.gguf"))
    return reference, stage_of(tmp_path)


def budget_of(reference: Reference, table: dict[str, Row], type_name: str) -> Budget:
    """As large as a file that is all of one type, which is its stock preset too."""
    tensors = quantizable(reference.header)
    size = sum(TENSOR_TYPES[type_name].nbytes(tensors[name].n_elements) for name in table)
    return Budget("b", size + 1000, 1000, dict.fromkeys(table, type_name))


def test_a_choice_obeys_all_rules_and_stays_within_the_size(tiny: tuple[Reference, ImatrixStage]) -> None:
    reference, stage = tiny
    table = table_of(reference)
    budget = budget_of(reference, table, "Q4_K")
    rules = ruled("pin token_embd=IQ4_NL", "min attn_v=Q6_K", r"max blk\.1\.ffn=Q3_K")
    solution = choose(reference, stage, table, budget, rules)
    assert solution.nbytes <= budget.size_bytes - budget.fixed_bytes
    assert solution.types["token_embd.weight"] == "IQ4_NL"
    assert all(solution.types[f"blk.{n}.attn_v.weight"] in ("Q6_K", "Q8_0") for n in (0, 1))
    assert solution.types["blk.1.ffn_up.weight"] in ("Q2_K", "Q3_K")
    assert solution.cost >= choose(reference, stage, table, budget).cost


def test_a_pin_outside_the_table_is_priced_by_its_bits(tiny: tuple[Reference, ImatrixStage]) -> None:
    reference, stage = tiny
    table = table_of(reference)
    [option] = options_for(reference, stage, table, ruled("pin output=Q5_0"))["output.weight"]
    near = table["output.weight"].price("Q5_K")
    assert (option.type, option.cost) == ("Q5_0", pytest.approx(near))
    [coarse] = options_for(reference, stage, table, ruled("pin blk.0.attn_q=IQ2_XXS"))["blk.0.attn_q.weight"]
    assert coarse.cost == pytest.approx(table["blk.0.attn_q.weight"].price("Q2_K") * 4 ** (2.625 - 2.0625))


def test_a_pin_that_needs_an_imatrix_entry_is_refused_without_one(tiny: tuple[Reference, ImatrixStage]) -> None:
    reference, stage = tiny
    with pytest.raises(UsageError, match=r"it has no imatrix entry — the nearest possible is IQ1_M"):
        options_for(reference, stage, table_of(reference), ruled("pin token_embd=IQ2_XXS"))


SPEED = SpeedTable("t", {name: TENSOR_TYPES[name].bpw * 1e-12 for name in WEIGHT_TYPES} | {"Q2_K": 9e-12}, {})


@pytest.mark.parametrize("ratio", [0.8, 1.0, 1.05])
def test_the_wanted_speed_is_kept(tiny: tuple[Reference, ImatrixStage], ratio: float) -> None:
    reference, stage = tiny
    table = table_of(reference)
    budget = budget_of(reference, table, "Q4_K")
    solution = choose(reference, stage, table, budget, Constraints((), SPEED, ratio))
    tensors = quantizable(reference.header)
    stock = sum(seconds_per_token(SPEED, tensors[name], "Q4_K", reference.header) for name in table)
    assert stock / solution.seconds >= ratio * (1 - 1e-6)


def test_a_speed_out_of_reach_names_one_that_is_reachable(tiny: tuple[Reference, ImatrixStage]) -> None:
    reference, stage = tiny
    table = table_of(reference)
    budget = budget_of(reference, table, "Q4_K")
    with pytest.raises(DoesNotFitError, match=r"the largest possible is --min-speed \d\.\d+") as error:
        choose(reference, stage, table, budget, Constraints((), SPEED, 100.0))
    reachable = float(error.value.fix.split()[-1])
    assert reachable > 1
    assert choose(reference, stage, table, budget, Constraints((), SPEED, reachable)).types
    with pytest.raises(DynrunError):
        choose(reference, stage, table, budget, Constraints((), SPEED, reachable * 1.01))


def test_impossible_sizes_say_the_nearest_possible(tiny: tuple[Reference, ImatrixStage]) -> None:
    reference, stage = tiny
    table = table_of(reference)
    smallest = 1000 + sum(
        min(o.nbytes for o in options) for options in options_for(reference, stage, table, Constraints()).values()
    )
    with pytest.raises(DoesNotFitError, match=f"the smallest possible is {smallest:,} bytes"):
        choose(reference, stage, table, Budget("b", smallest - 1, 1000))
    assert choose(reference, stage, table, Budget("b", smallest, 1000)).nbytes == smallest - 1000
    with pytest.raises(DoesNotFitError, match=f"{reference.header.file_bytes:,} bytes"):
        choose(reference, stage, table, Budget("b", reference.header.file_bytes + 1, 1000))


def test_the_table_of_these_tests_is_solved_as_the_stage_solves_it(tiny: tuple[Reference, ImatrixStage]) -> None:
    reference, stage = tiny
    table = table_of(reference)
    budget = budget_of(reference, table, "Q4_K")
    options = options_for(reference, stage, table, Constraints())
    assert {o.type for choices in options.values() for o in choices} == set(K_MENU)
    assert choose(reference, stage, table, budget) == solve(options, budget.size_bytes - budget.fixed_bytes)


def test_a_table_of_speeds_with_a_kind_that_the_model_has_not_is_refused() -> None:
    tensors = ["blk.0.attn_q.weight", "blk.1.ffn_up.weight"]
    check_kinds(SpeedTable("s.toml", {}, {"ffn_up": {"Q4_K": 1e-9}}), tensors)
    with pytest.raises(UsageError, match=r"s\.toml: the model has no tensor of kind 'ffn_upp'.*attn_q, ffn_up"):
        check_kinds(SpeedTable("s.toml", {}, {"ffn_upp": {"Q4_K": 1e-9}}), tensors)


def test_of_two_types_as_near_the_finer_one_is_nearest() -> None:
    # 4.5 bits per weight lie between Q3_K's 3.4375 and Q5_K's 5.5; Q5_K is a little nearer.
    assert nearest_type("Q4_K", ["Q3_K", "Q5_K"]) == "Q5_K"
    # As near, above and below: 2.0625 + 0.5 = 2.5625, and 3.0625.
    assert nearest_type("IQ2_S", ["IQ2_XXS", "IQ3_XXS"]) == "IQ3_XXS"
    assert nearest_type("IQ2_S", ["IQ3_XXS", "IQ2_XXS"]) == "IQ3_XXS"


def test_a_speed_that_is_no_ratio_is_named() -> None:
    with pytest.raises(UsageError, match=r"--min-speed is -1"):
        Constraints((), SpeedTable("t", {}, {}), -1.0)
