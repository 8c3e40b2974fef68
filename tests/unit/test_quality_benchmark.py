"""The pure parts of benchmarks/quality.py: controls of the right size, rows that outlive a kill, the summary."""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrun.calibration.imatrix import Imatrix
from dynrun.errors import DoesNotFitError, DynrunError, UsageError
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.tensor_types import DEFAULT_MENU, TENSOR_TYPES
from dynrun.gguf.weights import WeightFile
from tests.tiny import write_tiny_llama

_FOLDER = str(Path(__file__).resolve().parents[2] / "benchmarks")
sys.path.insert(0, _FOLDER)
methods, rows, summary, quality = (
    importlib.import_module(name) for name in ("quality_methods", "quality_rows", "quality_summary", "quality")
)
sys.path.remove(_FOLDER)

SHAPES = {"token_embd.weight": (768, 4096), "output.weight": (768, 4096)} | {
    f"blk.{block}.{name}.weight": shape
    for block in range(12)
    for name, shape in {"attn_q": (768, 576), "attn_output": (576, 768), "ffn_down": (1536, 768)}.items()
}
N_ELEMENTS = {name: math.prod(shape) for name, shape in SHAPES.items()}
SIZES = {
    name: {t: TENSOR_TYPES[t].nbytes(N_ELEMENTS[name]) for t in DEFAULT_MENU if TENSOR_TYPES[t].fits(shape[0])}
    for name, shape in SHAPES.items()
}


def _bytes(types: dict[str, str]) -> int:
    return sum(SIZES[name][type_name] for name, type_name in types.items())


def _errors(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    found = {}
    for name, types in SIZES.items():
        relative = {t: 4.0 ** -TENSOR_TYPES[t].bpw for t in types}
        energy, n_rows = float(rng.lognormal(0, 2)), float(SHAPES[name][1])
        by_row = {t: e * n_rows for t, e in relative.items()}
        found[name] = methods.SquaredErrors({t: e * energy for t, e in relative.items()}, by_row)
    return found


@settings(max_examples=60, deadline=None)
@given(bpw=st.floats(2.6, 7.5), seed=st.integers(0, 1000))
def test_a_random_allocation_is_never_over_its_budget_and_hits_it_within_half_a_percent(bpw: float, seed: int) -> None:
    budget = int(bpw * sum(N_ELEMENTS.values()) / 8)
    floor = math.ceil(0.995 * budget)
    types = methods.random_types(SIZES, N_ELEMENTS, budget, floor, seed)
    assert floor <= _bytes(types) <= budget
    assert all(types[name] in SIZES[name] for name in SHAPES)


def test_a_seed_gives_one_random_allocation_and_seeds_differ() -> None:
    budget = sum(N_ELEMENTS.values()) // 2
    one, again, other = (methods.random_types(SIZES, N_ELEMENTS, budget, budget - 9999, seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_a_random_allocation_stays_near_the_budgets_bits_for_every_tensor() -> None:
    budget = int(4.5 * sum(N_ELEMENTS.values()) / 8)
    for seed in range(5):
        types = methods.random_types(SIZES, N_ELEMENTS, budget, budget - 9999, seed)
        assert all(2.5 <= TENSOR_TYPES[t].bpw <= 8.5 for t in types.values())
        assert len(set(types.values())) > 4


@pytest.mark.parametrize("bpw", [1.0, 17.0])
def test_a_random_allocation_of_an_impossible_size_is_refused(bpw: float) -> None:
    budget = int(bpw * sum(N_ELEMENTS.values()) / 8)
    with pytest.raises(DoesNotFitError, match="no random choice"):
        methods.random_types(SIZES, N_ELEMENTS, budget, budget - 99, 0)


@pytest.mark.parametrize("by_row", [False, True])
def test_weighted_mse_alone_has_less_error_than_random_at_the_same_size(by_row: bool) -> None:
    errors, budget = _errors(), int(4.0 * sum(N_ELEMENTS.values()) / 8)

    def cost(types: dict[str, str]) -> float:
        return sum((errors[n].by_row if by_row else errors[n].absolute)[t] for n, t in types.items())

    best = methods.least_squares_types(SIZES, errors, budget, by_row=by_row)
    assert 0.995 * budget <= _bytes(best) <= budget
    assert cost(best) < min(
        cost(methods.random_types(SIZES, N_ELEMENTS, budget, int(0.995 * budget), seed)) for seed in range(5)
    )


def test_weighted_mse_in_absolute_units_gives_bits_to_tensors_with_much_energy() -> None:
    errors, budget = _errors(), int(4.0 * sum(N_ELEMENTS.values()) / 8)
    equal = [name for name in SHAPES if "attn_q" in name]
    energy = {name: errors[name].absolute["Q4_K"] for name in equal}
    types = methods.least_squares_types(SIZES, errors, budget, by_row=False)
    most, least = max(equal, key=energy.__getitem__), min(equal, key=energy.__getitem__)
    assert TENSOR_TYPES[types[most]].bpw > TENSOR_TYPES[types[least]].bpw
    by_row = methods.least_squares_types(SIZES, errors, budget, by_row=True)
    assert len({by_row[name] for name in equal}) < len({types[name] for name in equal})


def test_squared_errors_are_the_sums_over_the_tensor(tmp_path: Path) -> None:
    weights = WeightFile(write_tiny_llama(tmp_path / "m.gguf", n_expert=4, n_vocab=512))
    name = "blk.0.ffn_down_exps.weight"
    h = np.arange(1, 4 * 512 + 1, dtype=np.float64).reshape(4, 512)
    imatrix = Imatrix({name: h * 8}, {name: np.full(4, 8.0)})
    values = weights.rows(name).astype(np.float64).reshape(4, 256, 512)
    energies = methods.weighted_energy(weights, h.astype(np.float32), name)
    assert energies == pytest.approx((values**2 * h[:, None, :]).sum(axis=(1, 2)))
    # The model is F16: nothing is lost.
    assert methods.squared_errors(weights, imatrix, name, ["F16"], 1) == methods.SquaredErrors({"F16": 0}, {"F16": 0})


def test_squared_errors_go_on_after_a_kill(tmp_path: Path) -> None:
    weights = WeightFile(write_tiny_llama(tmp_path / "m.gguf", n_vocab=512))
    types, path = {name: ["F16"] for name in quantizable(weights.header)}, tmp_path / "errors.jsonl"
    whole = methods.all_squared_errors(weights, Imatrix({}, {}), types, path, 1)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]).replace("0.0", "7.0") + lines[3][:10])
    again = methods.all_squared_errors(weights, Imatrix({}, {}), types, path, 1)
    assert list(again) == list(whole)
    assert [errors.absolute["F16"] for errors in again.values()] == [7.0] * 3 + [0.0] * (len(types) - 3)


def _cell(method: str, kld: float, **changes: Any) -> Any:
    at = {"label": "Q4_K_M", "text": "code", "seed": None, "predicted_kld": None} | changes
    spread = np.array([0.9, 1.0, 1.1])
    values: dict[str, Any] = {
        "model": "demo",
        "bytes": 1000,
        "budget_bytes": 1000,
        "bpw": 4.5,
        "kld": kld,
        "kld_low": 0.9 * kld,
        "kld_high": 1.1 * kld,
        "same_top_p": 0.8,
        "made_s": 1.5,
        "seconds": 2.0,
        "key": "k",
        "sums": tuple((100 * kld * spread).tolist()),
        "counts": (100, 100, 100),
    }
    return rows.Cell(method=method, **values | at)


def test_rows_are_read_back_exactly_and_a_torn_one_is_measured_again(tmp_path: Path) -> None:
    cells = [_cell("stock", 0.1), _cell("ours", 0.1 / 3, predicted_kld=1 / 7), _cell("random", 0.2, seed=3)]
    for cell in cells:
        rows.append(tmp_path, cell)
    assert rows.load(tmp_path) == cells
    path = tmp_path / rows.CSV_FILE
    path.write_text(path.read_text()[:-30])
    assert rows.load(tmp_path) == cells[:2]
    rows.append(tmp_path, cells[2])
    assert rows.load(tmp_path) == cells


def test_a_cell_measured_again_replaces_the_old_one(tmp_path: Path) -> None:
    for kld in (0.3, 0.2):
        rows.append(tmp_path, _cell("ours", kld))
    assert [cell.kld for cell in rows.load(tmp_path)] == [0.2]


def test_redone_methods_are_forgotten_for_their_model_and_labels_only(tmp_path: Path) -> None:
    kept = [_cell("stock", 0.1), _cell("ours", 0.1, label="Q2_K"), _cell("ours", 0.1, model="demo-moe")]
    for cell in [*kept, _cell("ours", 0.1)]:
        rows.append(tmp_path, cell)
    rows.drop(tmp_path, "demo", ["Q4_K_M"], ["ours"])
    assert rows.load(tmp_path) == kept


def test_rows_from_before_a_column_was_added_are_read_and_added_to(tmp_path: Path) -> None:
    old, new = _cell("no-feedback", 0.1), _cell("ours", 0.1 / 3, rounded_s=7.5)
    rows.append(tmp_path, old)
    path = tmp_path / rows.CSV_FILE
    head, row = path.read_text().splitlines()
    at = head.split(",").index("rounded_s")
    values = row.split(",")
    assert values.pop(at) == ""
    path.write_text(f"{head.replace('rounded_s,', '')}\n{','.join(values)}\n")
    assert rows.load(tmp_path) == [old]
    rows.append(tmp_path, new)
    assert rows.load(tmp_path) == [old, new]


def test_another_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / rows.CSV_FILE).write_text("a,b\n1,2\n")
    with pytest.raises(DynrunError, match="no CSV of this benchmark"):
        rows.load(tmp_path)


def _table() -> list[Any]:
    """Two labels, two texts; ours a quarter and a half of stock, predicted 10% too high."""
    cells = []
    for label, bpw, stock in (("Q2_K", 2.9, 1.6), ("Q4_K_M", 4.9, 0.1)):
        for text, share in (("wikitext", 0.25), ("code", 0.5)):
            at = {"label": label, "text": text, "bpw": bpw, "budget_bytes": int(bpw * 1000), "bytes": int(bpw * 1000)}
            cells += [
                _cell("stock", stock, **at),
                _cell("ours", share * stock, predicted_kld=0.4 * stock, **at),
                _cell("wmse", 0.8 * stock, **at),
                *(_cell("random", (0.9 + 0.2 * seed) * stock, seed=seed, **at) for seed in range(2)),
            ]
    return cells


def test_geometric_means_are_over_the_cells_of_both_methods() -> None:
    cells = _table()
    means = summary.summarize(cells)["models"]["demo"]["geometric_mean"]
    assert means["ours/stock"] == pytest.approx(math.sqrt(0.25 * 0.5))
    assert means["wmse/stock"] == pytest.approx(0.8)
    assert means["ours/wmse"] == pytest.approx(math.sqrt(0.125) / 0.8)
    assert means["random:1/stock"] == pytest.approx(1.1)
    fewer = [c for c in cells if (c.method, c.text) != ("stock", "code")]
    assert summary.summarize(fewer)["models"]["demo"]["geometric_mean"]["ours/stock"] == pytest.approx(0.25)
    assert summary.geometric_mean([]) is None


def test_the_interval_of_a_geometric_mean_is_paired() -> None:
    """Sequences are hard for both alike, so the ratio is the same whichever are drawn."""
    low, high = summary.summarize(_table())["models"]["demo"]["geometric_mean_ci95"]["ours/stock"]
    assert low == pytest.approx(high)
    assert low == pytest.approx(math.sqrt(0.125))


def test_the_summary_answers_what_the_issue_asks() -> None:
    found = summary.summarize(_table())["models"]["demo"]
    assert found["worst_cell"]["ratio"] == pytest.approx(0.5)
    assert found["worst_cell"]["text"] == "code"
    assert found["under_every_random"] == {"geometric_mean": True, "every_cell": True}
    assert found["prediction"]["spearman"] == pytest.approx(0.894, abs=1e-3)
    # From 3 bpw on only Q4_K_M counts: 0.04 predicted, 0.025 and 0.05 measured.
    assert found["prediction"]["worst_factor"] == pytest.approx(1.6)
    met = {name: one["met"] for name, one in found["wanted"].items()}
    assert met == {
        "ours/stock": True,
        "worst cell": True,
        "ours/wmse": True,
        "ours/wmse-row": None,
        "under every random": True,
        "spearman": False,
        "factor": False,
        "sizes": True,
    }


def _in_both_roundings() -> list[Any]:
    """Two families of types, two texts; feedback takes a half off the k-quant and makes one cell of the other worse."""
    cells = []
    for label, text, stock, shares in (
        ("Q2_K", "wikitext", 1.6, (0.25, 0.5)),
        ("Q2_K", "code", 1.2, (1.0, 0.5)),
        ("IQ3_XXS", "wikitext", 0.8, (0.9, 0.8)),
        ("IQ3_XXS", "code", 0.6, (1.1, 0.8)),
    ):
        at = {"label": label, "text": text}
        cells += [
            _cell("stock", stock, **at),
            _cell("stock+feedback", shares[0] * stock, bytes=1300, **at),
            _cell("no-feedback", 0.6 * stock, predicted_kld=0.6 * stock, **at),
            _cell("ours", shares[1] * 0.5 * stock, predicted_kld=0.3 * stock, **at),
            _cell("ours/plain", 0.5 * stock, **at),
        ]
    return cells


def test_feedback_is_compared_on_the_same_types_and_by_the_kind_of_types() -> None:
    found = summary.summarize(_in_both_roundings())["models"]["demo"]["rounding"]
    means = {name: one["geometric_mean"] for name, one in found.items()}
    assert means == {
        "stock+feedback over stock, k-quants": pytest.approx(0.5),
        "stock+feedback over stock, IQ": pytest.approx(math.sqrt(0.99)),
        "ours over ours/plain": pytest.approx(math.sqrt(0.4)),
        "no-feedback over stock": pytest.approx(0.6),
    }
    assert found["ours over ours/plain"]["labels"] == {"Q2_K": pytest.approx(0.5), "IQ3_XXS": pytest.approx(0.8)}


def test_cells_that_feedback_makes_worse_beyond_chance_are_counted_and_named() -> None:
    found = summary.summarize(_in_both_roundings())["models"]["demo"]["rounding"]["stock+feedback over stock, IQ"]
    assert (found["n_cells"], found["n_above"], found["above"]) == (2, 1, ["IQ3_XXS code"])
    assert found["worst_cell"]["text"] == "code"
    assert found["worst_cell"]["ratio"] == pytest.approx(1.1)
    noisy = [replace(c, sums=c.sums[::-1]) if c.method == "stock+feedback" else c for c in _in_both_roundings()]
    again = summary.summarize(noisy)["models"]["demo"]["rounding"]["stock+feedback over stock, IQ"]
    assert again["worst_cell"]["ratio"] == pytest.approx(1.1)
    assert again["n_above"] == 0


def test_without_ours_the_comparisons_are_made_with_ours_without_feedback() -> None:
    cells = [c for c in _in_both_roundings() if c.method in ("stock", "no-feedback")]
    cells += [replace(c, method="wmse") for c in cells if c.method == "stock"]
    found = summary.summarize(cells)
    model = found["models"]["demo"]
    assert model["compared"] == "no-feedback"
    assert model["geometric_mean"]["no-feedback/wmse"] == pytest.approx(0.6)
    assert model["worst_cell"]["ratio"] == pytest.approx(0.6)
    assert model["wanted"]["no-feedback/stock"]["measured"] == pytest.approx(0.6)
    assert found["prediction"]["spearman"] == pytest.approx(1.0)
    assert "| 0.600 (0.600–0.600) |" in summary.markdown(cells, found)


def test_the_table_tells_both_roundings() -> None:
    cells = _in_both_roundings()
    table = summary.markdown(cells, summary.summarize(cells))
    assert "| stock+feedback/stock | no-feedback/stock | random/stock | ours over ours/plain |" in table
    assert "stock+feedback over stock, IQ: 0.995 (0.995–0.995) over 2 cells, 1 wholly above 1 (IQ3_XXS code);" in table


def test_only_the_stock_types_may_be_larger_with_our_metadata() -> None:
    cells = [_cell("stock", 0.1), _cell("stock+feedback", 0.1, bytes=1300), _cell("no-feedback", 0.1, bytes=1001)]
    assert summary.summarize(cells)["models"]["demo"]["sizes"] == {"over": ["Q4_K_M no-feedback"], "under": []}


def test_files_of_another_size_are_named() -> None:
    cells = [_cell("stock", 0.1), _cell("ours", 0.1, bytes=1001), _cell("wmse", 0.1, bytes=994)]
    found = summary.summarize(cells)["models"]["demo"]
    assert found["sizes"] == {"over": ["Q4_K_M ours"], "under": ["Q4_K_M wmse"]}
    assert found["wanted"]["sizes"]["met"] is False


def test_cells_of_other_settings_are_not_compared() -> None:
    cells = [_cell("stock", 0.1), replace(_cell("ours", 0.05), key="other")]
    assert cells[1].ratio_to(cells[0]) is None
    assert summary.summarize(cells)["models"]["demo"]["geometric_mean"]["ours/stock"] is None


def test_a_report_from_the_csv_alone_writes_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for cell in _table():
        rows.append(tmp_path, cell)
    quality.report(tmp_path)
    assert '"ours/stock": 0.35' in capsys.readouterr().out
    assert (tmp_path / "quality-demo.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "quality.md").read_text()
    assert "| Q2_K | code | 2,900 | 2,900 | 1.6000 | 0.8000 | 0.6400 | 0.500 (0.500–0.500) |" in table
    assert "| 0.90–1.10 |" in table
    with pytest.raises(UsageError, match="with rows"):
        quality.report(tmp_path / "empty")


def test_methods_are_measured_in_the_order_that_is_useful_early() -> None:
    spec = "random:2,wmse,no-feedback,ours/plain,ours,stock+feedback,stock"
    names = ("stock", "stock+feedback", "ours", "ours/plain", "no-feedback", "wmse")
    assert quality.methods_of(spec) == [*((name, None) for name in names), ("random", 0), ("random", 1)]


@pytest.mark.parametrize("spec", ["best", "random", "ours:2", "random:x", ""])
def test_an_unknown_method_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="no method"):
        quality.methods_of(spec)
