"""Files beside the stock curve: ratios, what is known of imatrices, which presets make the curve."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dynrun.artifacts import sha256_file, stage_folder
from dynrun.evaluation.compare import Comparison, Named, compare, imatrix_of
from dynrun.evaluation.kld import Continuation, Domain, Row, score_of
from dynrun.evaluation.stock_curve import around, imatrix_of_stock
from dynrun.quantize import MODEL_FILE, Preset
from dynrun.scoring.divergence import Divergence

HARDNESS = np.random.default_rng(3).lognormal(0, 0.5, 12)


def _divergences(level: float, seed: int) -> list[Divergence]:
    rng = np.random.default_rng(seed)
    found = []
    for hardness in HARDNESS:
        log_p = -rng.exponential(2.0, 30)
        kld = level * hardness * rng.exponential(1.0, 30)
        found.append(Divergence(kld, rng.random(30) > level, log_p, log_p - 0.1 * kld))
    return found


def _row(name: str, size_bytes: int, level: float, seed: int = 0) -> Row:
    divergences = _divergences(level, seed)
    domains = (Domain("a", score_of(divergences[:5])), Domain("b", score_of(divergences[5:])))
    return Row(Path(name), size_bytes, 4.0, score_of(divergences), domains)


@pytest.fixture
def comparison() -> Comparison:
    stock = [Named(f"S{size}", _row(f"s{size}", size, 100 / size, size), "same") for size in (300, 100, 200)]
    stock.append(Named("BAD", _row("bad", 250, 0.9, 7), "same"))
    files = [Named("half", _row("half", 200, 0.25, 200), "unknown"), Named("small", _row("small", 90, 1.0, 5), "same")]
    return compare(Path("reference"), ["builtin"], files, stock, ["a note"])


def test_a_file_of_a_presets_size_with_half_its_divergence_has_half_the_ratio(comparison: Comparison) -> None:
    found = comparison.rows[0].equal_size
    assert found is not None
    assert found.ratio == pytest.approx(0.5)
    assert found.ci95 == pytest.approx((0.5, 0.5))
    assert not found.extrapolated


def test_a_smaller_file_than_all_is_marked_as_extrapolated(comparison: Comparison) -> None:
    found = comparison.rows[1].equal_size
    assert found is not None
    assert found.extrapolated
    assert comparison.to_json()["rows"][1]["extrapolated"] is True


def test_the_curve_is_in_order_of_size_and_tells_what_is_beaten(comparison: Comparison) -> None:
    assert [(point.label, point.on_curve) for point in comparison.curve] == [
        ("S100", True),
        ("S200", True),
        ("BAD", False),
        ("S300", True),
    ]


def test_the_json_of_a_comparison_has_what_is_promised(comparison: Comparison) -> None:
    data = json.loads(json.dumps(comparison.to_json()))
    first = data["rows"][0]
    assert {"file", "size_bytes", "bpw", "kld", "same_top_p", "rms_dp", "ppl", "equal_size_ratio"} <= first.keys()
    assert {"mean", "ci95", "median", "p90", "p99", "p999", "max"} <= first["kld"].keys()
    assert [domain["name"] for domain in first["domains"]] == ["a", "b"]
    assert data["notes"] == ["a note"]


def test_a_score_weighs_tokens_and_tells_the_ratio_of_perplexities() -> None:
    divergences = _divergences(0.3, 1)
    score = score_of(divergences)
    kld, p, q = (
        np.concatenate([getattr(d, n) for d in divergences]) for n in ("kld", "log_p_reference", "log_p_model")
    )
    assert score.kld.mean == pytest.approx(kld.mean())
    assert score.ln_ppl_ratio.value == pytest.approx(np.log(score.ppl / score.ppl_reference)) == (p - q).mean()
    assert score.ln_ppl_ratio.ci95[0] < score.ln_ppl_ratio.value < score.ln_ppl_ratio.ci95[1]
    assert (score.n_tokens, score.n_sequences) == (360, 12)


def test_a_difference_is_paired_like_a_ratio() -> None:
    one, other = _row("one", 1, 0.4, 3), _row("other", 1, 0.3, 3)
    difference = one.difference_to(other)
    assert difference.value == pytest.approx(one.kld.mean - other.kld.mean)
    assert 0 < difference.ci95[0] < difference.value < difference.ci95[1]
    # Unpaired, the texts' own spread would hide it.
    assert difference.ci95[1] - difference.ci95[0] < 0.5 * (one.kld.ci95[1] - one.kld.ci95[0])
    assert one.difference_to(one).ci95 == (0, 0)


def test_a_continuation_tells_where_files_part() -> None:
    found = Continuation(32, (None, 3, 10, None), score_of(_divergences(0.3, 1)))
    assert found.identical == 0.5
    assert found.median_parted == 21
    assert found.to_json()["parted"] == [None, 3, 10, None]


@pytest.mark.parametrize(
    ("metadata", "stock", "said"),
    [
        ({"dynrun.imatrix.sha256": "f" * 64}, None, "same"),
        ({"dynrun.imatrix.sha256": "0" * 64}, None, "other"),
        ({}, "f" * 64, "same"),
        ({}, None, "unknown"),
        ({"quantize.imatrix.file": "/home/x/unsloth_calibration.gguf"}, None, "unknown (unsloth_calibration.gguf)"),
    ],
)
def test_an_imatrix_is_known_by_its_hash_alone(metadata: dict[str, str], stock: str | None, said: str) -> None:
    assert imatrix_of(metadata, stock, "f" * 64) == said


def test_without_a_known_imatrix_of_the_curve_none_is_known() -> None:
    assert imatrix_of({"dynrun.imatrix.sha256": "f" * 64}, None, None) == "unknown"


def test_stock_files_of_this_cache_tell_their_imatrix_and_changed_ones_do_not() -> None:
    folder = stage_folder("stock", {"imatrix": "f" * 64})
    folder.path.mkdir(parents=True)
    model = folder / MODEL_FILE
    model.write_bytes(b"a model")
    folder.commit({"sha256": sha256_file(model)}, elapsed_s=0)
    assert imatrix_of_stock(model) == "f" * 64
    model.write_bytes(b"another one")
    assert imatrix_of_stock(model) is None
    assert imatrix_of_stock(folder / "nowhere.gguf") is None


def _presets(*sizes: int) -> list[Preset]:
    return [Preset(f"P{size}", {}, size) for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [
        ([25], [10, 20, 30, 40]),
        ([30], [20, 30, 40]),
        ([5], [10, 20]),
        ([99], [50, 60]),
        ([15, 55], [10, 20, 30, 40, 50, 60]),
    ],
)
def test_the_curve_has_two_presets_on_either_side_of_a_file(sizes: list[int], kept: list[int]) -> None:
    assert [preset.size_bytes for preset in around(_presets(10, 20, 30, 40, 50, 60), sizes)] == kept
