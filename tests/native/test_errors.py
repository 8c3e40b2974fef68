"""The error of a type on a tensor: by all rows, by a sample of them, over experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from dynrun.calibration.imatrix import Imatrix
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.weights import WeightFile, encode
from dynrun.sensitivity.errors import Quantizer
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
Rows = npt.NDArray[np.float32]
ALL = 10**9
TYPES = ("IQ2_XXS", "Q2_K", "Q3_K", "IQ4_XS", "Q5_K")
COUNTS = {1: [64.0], 4: [90.0, 0.0, 25.0, 13.0]}
# Named by no imatrix, as it is looked up and never multiplied.
EMBEDDING = "token_embd.weight"
DOWN, GATE_EXPERTS = "blk.0.ffn_down.weight", "blk.1.ffn_gate_exps.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "dense.gguf")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "experts.gguf", n_ff=256, n_expert=4)


def imatrix_of(path: Path) -> Imatrix:
    """Made up: some columns count far more than others, in every expert others; the second expert saw nothing."""
    random = np.random.default_rng(0)
    sums, counts = {}, {}
    for name, tensor in quantizable(WeightFile(path).header).items():
        if name != EMBEDDING:
            counts[name] = np.array(COUNTS[int(np.prod(tensor.shape[2:]))])
            mean = np.exp(2 * random.standard_normal((len(counts[name]), tensor.shape[0])))
            sums[name] = mean * counts[name][:, None]
    return Imatrix(sums, counts)


def quantizer_of(path: Path) -> Quantizer:
    return Quantizer(WeightFile(path), imatrix_of(path), 2)


def with_rows(path: Path, out: Path, name: str, rows: Sequence[int], values: Rows) -> Path:
    """A copy of a model with other ``values`` in some ``rows`` of a tensor."""
    weights = WeightFile(path)
    tensor, data = weights.header.tensors[name], path.read_bytes()
    changed = weights.rows(name)
    changed[np.array(rows)] = values
    start = weights.header.data_offset + tensor.offset
    out.write_bytes(data[:start] + encode(changed, "F16").tobytes() + data[start + tensor.nbytes :])
    return out


@pytest.mark.parametrize("model", ["dense", "experts"])
def test_all_rows_give_the_error_of_the_whole_replacement(model: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(model)
    quantizer = quantizer_of(path)
    for name in ("blk.0.attn_v.weight", "output.weight", DOWN if model == "dense" else GATE_EXPERTS):
        found = quantizer.errors(name, TYPES, ALL)
        assert list(found.errors) == list(TYPES)
        assert found.spread == 0.0
        for type_name in TYPES:
            wanted = quantizer.replacement(name, type_name).error
            assert found.errors[type_name] == pytest.approx(wanted, rel=1e-5), (name, type_name)


def test_errors_fall_with_the_bits_and_full_precision_has_none(dense: Path) -> None:
    found = quantizer_of(dense).errors(DOWN, [*TYPES, "F16"], ALL).errors
    # Of F16 weights F16 loses nothing.
    assert found["F16"] == 0.0
    assert found["IQ2_XXS"] > found["Q3_K"] > found["Q5_K"] > 0


def test_the_error_is_weighted_by_what_the_columns_see(dense: Path) -> None:
    weights, entries = WeightFile(dense), imatrix_of(dense)
    h = entries.sums[DOWN][0] / 64
    values = weights.rows(DOWN).astype(np.float64)
    replaced = quantizer_of(dense).replacement(DOWN, "Q3_K")
    lost = np.square(values - replaced.values)
    assert replaced.error == pytest.approx((lost @ h).sum() / (np.square(values) @ h).sum(), rel=1e-5)
    assert replaced.error != pytest.approx(lost.sum() / np.square(values).sum(), rel=0.02)


def test_without_an_entry_all_columns_count_alike(dense: Path) -> None:
    values = WeightFile(dense).rows(EMBEDDING).astype(np.float64)
    quantizer = quantizer_of(dense)
    replaced = quantizer.replacement(EMBEDDING, "Q3_K")
    wanted = np.square(values - replaced.values).sum() / np.square(values).sum()
    assert replaced.error == pytest.approx(wanted, rel=1e-5)
    found = quantizer.errors(EMBEDDING, ["Q3_K"], ALL)
    assert found.errors["Q3_K"] == pytest.approx(wanted, rel=1e-5)
    assert found.energy == pytest.approx(np.square(values).sum(), rel=1e-5)


@pytest.mark.parametrize("n_rows", [16, 48])
def test_a_sample_lies_within_its_stated_spread(dense: Path, experts: Path, n_rows: int) -> None:
    for path in (dense, experts):
        quantizer = quantizer_of(path)
        names = list(quantizable(quantizer.weights.header))[:6]
        for name in names:
            types = ["Q2_K", "Q4_K"]
            found, whole = quantizer.errors(name, types, n_rows), quantizer.errors(name, types, ALL)
            assert 0 < found.spread < 0.2
            assert found.energy == pytest.approx(whole.energy)
            for type_name in types:
                assert found.errors[type_name] == pytest.approx(whole.errors[type_name], rel=4 * found.spread), name


def test_the_same_rows_are_sampled_again(dense: Path) -> None:
    assert quantizer_of(dense).errors(DOWN, TYPES, 24) == quantizer_of(dense).errors(DOWN, TYPES, 24)


@pytest.mark.parametrize("row", [0, 37, 255])
@pytest.mark.parametrize(("shape", "within"), [("all entries", 0.02), ("few entries", 0.1)])
def test_a_row_that_holds_nearly_all_energy_is_in_every_sample(
    dense: Path, tmp_path: Path, row: int, shape: str, within: float
) -> None:
    """As those that write massive activations: its own error is nearly the tensor's, whatever the other rows' is. Where
    it is quantized so well that the others' errors show beside it, these are known less closely."""
    if shape == "all entries":
        massive = (300 * np.random.default_rng(1).uniform(-1, 1, 512) ** 7).astype(np.float32)
    else:
        massive = np.zeros(512, dtype=np.float32)
        massive[::64] = np.linspace(200.0, 900.0, 8)
    path = with_rows(dense, tmp_path / "massive.gguf", DOWN, [row], massive)
    quantizer = quantizer_of(path)
    whole = quantizer.errors(DOWN, TYPES, ALL).errors
    ordinary = quantizer_of(dense).errors(DOWN, TYPES, ALL).errors
    # Not looked at, it would leave the error far off.
    assert any(abs(np.log(whole[t] / ordinary[t])) > np.log(2) for t in TYPES)
    for n_rows in (16, 64):
        found = quantizer.errors(DOWN, TYPES, n_rows).errors
        assert found == pytest.approx(whole, rel=within)


def test_some_heavy_rows_are_met_as_often_as_they_count(dense: Path, tmp_path: Path) -> None:
    """No single row holds much, a twentieth of them holds half."""
    rows = list(range(3, 256, 20))
    values = WeightFile(dense).rows(DOWN)[rows] * np.float32(4.5)
    # Half of these entries are nothing: easier to quantize.
    values[:, ::2] = 0
    path = with_rows(dense, tmp_path / "heavy.gguf", DOWN, rows, values)
    quantizer = quantizer_of(path)
    whole, found = quantizer.errors(DOWN, TYPES, ALL), quantizer.errors(DOWN, TYPES, 64)
    for type_name in TYPES:
        assert found.errors[type_name] == pytest.approx(whole.errors[type_name], rel=max(0.05, 4 * found.spread))


def test_experts_are_weighted_by_their_share_of_the_tokens(experts: Path) -> None:
    weights, entries, quantizer = WeightFile(experts), imatrix_of(experts), quantizer_of(experts)
    values = weights.rows(GATE_EXPERTS).reshape(4, -1, 256).astype(np.float64)
    replaced = quantizer.replacement(GATE_EXPERTS, "Q3_K")
    lost = np.square(values - replaced.values.reshape(values.shape))
    # Their sums of x² hold the share already: s = share × mean of x².
    s = entries.sums[GATE_EXPERTS] / 128
    wanted = (lost @ s[:, :, None]).sum() / (np.square(values) @ s[:, :, None]).sum()
    assert replaced.error == pytest.approx(wanted, rel=1e-5)
    assert quantizer.errors(GATE_EXPERTS, ["Q3_K"], ALL).errors["Q3_K"] == pytest.approx(wanted, rel=1e-5)


def test_an_expert_that_saw_nothing_counts_for_nothing(experts: Path, tmp_path: Path) -> None:
    other = np.zeros((256, 256), dtype=np.float32)
    other[:, 3] = 500.0
    changed = with_rows(experts, tmp_path / "other.gguf", GATE_EXPERTS, range(256, 512), other)
    one, two = (quantizer_of(path).errors(GATE_EXPERTS, TYPES, 64) for path in (experts, changed))
    assert one == two
    seen = with_rows(experts, tmp_path / "seen.gguf", GATE_EXPERTS, range(512, 768), other)
    assert quantizer_of(seen).errors(GATE_EXPERTS, TYPES, 64).energy > 2 * one.energy


def test_where_no_expert_saw_anything_all_count_alike(experts: Path) -> None:
    entries = imatrix_of(experts)
    nothing = {name: np.zeros_like(counts) for name, counts in entries.counts.items()}
    quantizer = Quantizer(WeightFile(experts), Imatrix(entries.sums, nothing), 2)
    found = quantizer.errors(GATE_EXPERTS, ["Q3_K"], ALL)
    values = WeightFile(experts).rows(GATE_EXPERTS).astype(np.float64)
    lost = np.square(values - quantizer.replacement(GATE_EXPERTS, "Q3_K").values)
    assert found.errors["Q3_K"] == pytest.approx(lost.sum() / np.square(values).sum(), rel=1e-5)
    assert found.energy == pytest.approx(np.square(values).sum() / 4, rel=1e-5)


@pytest.mark.parametrize("n_rows", [20, ALL])
def test_the_energy_is_what_the_outputs_square_to(dense: Path, experts: Path, n_rows: int) -> None:
    """Σ mean(x²)·w², over experts by their share: of all rows, however few are sampled."""
    for path, name, count in ((dense, DOWN, 64), (experts, GATE_EXPERTS, 128)):
        entries = imatrix_of(path)
        s = entries.sums[name] / count
        values = WeightFile(path).rows(name).astype(np.float64).reshape(len(s), -1, s.shape[1])
        found = quantizer_of(path).errors(name, ["Q4_K"], n_rows)
        assert found.energy == pytest.approx((np.square(values) @ s[:, :, None]).sum(), rel=1e-5)


def test_a_tensor_of_nothing_loses_nothing(dense: Path, tmp_path: Path) -> None:
    path = with_rows(dense, tmp_path / "zero.gguf", DOWN, range(256), np.zeros((256, 512), dtype=np.float32))
    quantizer = quantizer_of(path)
    found = quantizer.errors(DOWN, ["Q3_K", "Q8_0"], 16)
    assert (found.errors, found.spread, found.energy) == ({"Q3_K": 0.0, "Q8_0": 0.0}, 0.0, 0.0)
    assert quantizer.replacement(DOWN, "Q3_K").error == 0.0
