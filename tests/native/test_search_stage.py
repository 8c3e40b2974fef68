"""The sensitivity and the search stage on disk: found again, and resumed to the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from dynrun.allocation.constraints import NO_CONSTRAINTS
from dynrun.allocation.search import SearchSettings
from dynrun.allocation.search_stage import RESULT_FILE, SearchStage, search, search_folder
from dynrun.allocation.stage import Budget, allocate
from dynrun.artifacts import MANIFEST, Outcome, StageFolder, sha256_file
from dynrun.calibration.imatrix import Imatrix, read_imatrix, write_imatrix
from dynrun.calibration.sequences import TokenSequence
from dynrun.calibration.stage import ImatrixStage
from dynrun.config import Config
from dynrun.gguf.header import read_header
from dynrun.gguf.layout import tensor_bytes
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp.engine import Engine
from dynrun.models import Reference
from dynrun.quantize import fixed_bytes
from dynrun.scoring.divergence import divergence
from dynrun.sensitivity.adaptive import Progress
from dynrun.sensitivity.errors import Quantizer
from dynrun.sensitivity.in_place import InPlace
from dynrun.sensitivity.stage import TABLE_FILE, ProbeSettings, SensitivityStage, measure_sensitivity
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
MENU = ("Q2_K", "Q3_K", "IQ4_XS", "Q5_K", "Q8_0")
CONFIG = Config(threads=2)
PROBES = ProbeSettings(n_tokens=96, error=0.0, n_ctx=32, n_rows=8)
SEARCH = SearchSettings(n_tokens=64, n_ctx=32, n_candidates=5, rounds=1)
MEASURED, ERRORS, PROBED = "measured.jsonl", "errors.jsonl", "probes.jsonl"


@dataclass
class Inputs:
    """What both stages are given, and how far they came."""

    reference: Reference
    imatrix: ImatrixStage
    text: list[TokenSequence]
    probed: list[Progress] = field(default_factory=list)
    told: list[tuple[float, float, str]] = field(default_factory=list)

    def table(self) -> SensitivityStage:
        return measure_sensitivity(
            *(self.reference, self.imatrix, self.text, PROBES, MENU),
            config=CONFIG,
            on_probe=self.probed.append,
            on_error=lambda _done, _total: None,
        )

    @property
    def budget(self) -> Budget:
        """A little more than all tensors take in Q3_K."""
        kept = fixed_bytes(self.reference, self.imatrix, "tiny")
        tensors = quantizable(self.reference.header).values()
        return Budget("tiny", kept + int(1.05 * sum(tensor_bytes(t, "Q3_K") for t in tensors)), kept)

    def search(self, table: SensitivityStage, settings: SearchSettings = SEARCH) -> SearchStage:
        def narrate(done: float, total: float, note: str = "") -> None:
            self.told.append((done, total, note))

        return search(
            *(self.reference, self.imatrix, table, self.text[:2], self.budget),
            constraints=NO_CONSTRAINTS,
            settings=settings,
            config=CONFIG,
            narrate=narrate,
        )

    def folder(self, table: SensitivityStage) -> StageFolder:
        inputs = (self.reference, self.imatrix, table, self.text[:2], self.budget, NO_CONSTRAINTS, SEARCH)
        return search_folder(*inputs)


def inputs_in(folder: Path) -> Inputs:
    random = np.random.default_rng(0)
    path = write_tiny_llama(folder / "tiny.gguf", n_ff=256)
    header = read_header(path)
    sums = {name: random.random((1, tensor.shape[0])) + 0.1 for name, tensor in quantizable(header).items()}
    write_imatrix(Imatrix(sums, {name: np.ones(1) for name in sums}, ("made up",)), folder / "imatrix.gguf")
    outcome = Outcome("imatrix", {}, 0.0, cached=True)
    digest = sha256_file(folder / "imatrix.gguf")
    imatrix = ImatrixStage(folder / "imatrix.gguf", digest, "made up", 64, 1, "", (), 0, 0, 0, 0.0, outcome)
    text = [TokenSequence(str(i), "chat", tuple(map(int, random.integers(0, 250, 32)))) for i in range(3)]
    return Inputs(Reference("tiny", header, sha256_file(path)), imatrix, text)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return inputs_in(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def made(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which both stages are made, without an interruption."""
    cache = tmp_path_factory.mktemp("made") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNRUN_CACHE", str(cache))
        inputs.search(inputs.table())
    return cache


@pytest.fixture
def cache(made: Path, inputs: Inputs, private_cache: Path) -> Path:
    """A copy of it for one test."""
    shutil.copytree(made, private_cache, dirs_exist_ok=True)
    inputs.probed.clear()
    inputs.told.clear()
    return private_cache


def table_folder(table: SensitivityStage) -> Path:
    return table.path.parent


def interrupt(folder: Path, result: str, log: str, n_lines: int, torn: str) -> bytes:
    """As a killed run leaves a folder: the first lines of the log, perhaps part of the next one; gives the result."""
    whole = (folder / result).read_bytes()
    lines = (folder / log).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / log).write_text("".join(lines[:n_lines]) + torn, encoding="utf-8")
    (folder / result).unlink()
    (folder / MANIFEST).unlink()
    return whole


@pytest.fixture
def no_model(inputs: Inputs) -> Iterator[None]:
    """What is done without the model's file cannot have loaded it."""
    away = inputs.reference.path.with_suffix(".away")
    inputs.reference.path.rename(away)
    yield
    away.rename(inputs.reference.path)


@pytest.mark.usefixtures("cache")
def test_the_scheme_is_the_best_of_those_measured_and_within_the_budget(inputs: Inputs) -> None:
    table = inputs.table()
    found, first = inputs.search(table), allocate(inputs.reference, inputs.imatrix, table.tensors, inputs.budget)
    klds = [trial["kld"] for trial in found.trials]
    assert klds == sorted(klds)
    assert len(klds) >= SEARCH.n_candidates
    assert found.scheme.measured_kld == klds[0]
    assert found.scheme.predicted_kld == found.trials[0]["predicted_kld"]
    assert found.ratio == pytest.approx(klds[0] / klds[1])
    assert found.ratio is not None
    assert found.ratio_ci95 is not None
    assert found.ratio_ci95[0] <= found.ratio <= found.ratio_ci95[1]
    additive = next(trial for trial in found.trials if trial["name"] == "additive")
    assert additive["predicted_kld"] == pytest.approx(first.predicted_kld)
    tensors = quantizable(inputs.reference.header)
    nbytes = sum(tensor_bytes(tensors[name], t) for name, t in found.scheme.types.items())
    assert found.scheme.size_bytes == inputs.budget.fixed_bytes + nbytes <= inputs.budget.size_bytes
    assert list(found.scheme.types) == list(tensors)
    assert found.scheme.label == "tiny"


@pytest.mark.usefixtures("cache")
def test_what_is_said_to_be_measured_is_the_divergence_in_place_and_what_is_not_seen_there(inputs: Inputs) -> None:
    table = inputs.table()
    types = inputs.search(table).scheme.types
    path, sequences = inputs.reference.path, inputs.text[:2]
    with Engine.open(path, n_ctx=32, n_threads=2) as engine:
        before = [engine.logits(sequence.tokens) for sequence in sequences]
        InPlace(engine, Quantizer(WeightFile(path), read_imatrix(inputs.imatrix.path), 2)).place(types)
        klds = [divergence(b, engine.logits(s.tokens)).kld for b, s in zip(before, sequences, strict=True)]
    unseen = sum(table.tensors[name].unseen(t) for name, t in types.items())
    # The original's logits were kept in 16 bits.
    wanted = float(np.concatenate(klds).mean()) + unseen
    assert inputs.search(table).scheme.measured_kld == pytest.approx(wanted, rel=1e-3)


@pytest.mark.usefixtures("cache", "no_model")
def test_both_stages_are_found_again_without_the_model(inputs: Inputs) -> None:
    table = inputs.table()
    assert table.outcome.cached
    found = inputs.search(table)
    assert found.outcome.cached
    assert (inputs.probed, inputs.told) == ([], [])
    assert inputs.search(table) == found


@pytest.mark.usefixtures("cache")
def test_without_candidates_the_additive_scheme_is_given_unmeasured(inputs: Inputs) -> None:
    table = inputs.table()
    found = inputs.search(table, SearchSettings(n_candidates=0))
    assert found.scheme == allocate(inputs.reference, inputs.imatrix, table.tensors, inputs.budget)
    assert (found.trials, found.ratio, found.scheme.measured_kld) == ((), None, None)
    assert inputs.told == []


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("torn", ["", '[["scheme", "5f1d', '[["scheme", "5f1d"], [0.25, 1e'])
def test_a_search_that_was_interrupted_ends_with_the_same_bytes(inputs: Inputs, torn: str) -> None:
    table = inputs.table()
    folder = inputs.folder(table)
    uninterrupted = inputs.search(table)
    log = (folder / MEASURED).read_text(encoding="utf-8")
    whole = interrupt(folder.path, RESULT_FILE, MEASURED, 2, torn)
    resumed = inputs.search(table)
    assert not resumed.outcome.cached
    assert (folder / RESULT_FILE).read_bytes() == whole
    assert (folder / MEASURED).read_text(encoding="utf-8") == log
    assert (resumed.scheme, resumed.trials) == (uninterrupted.scheme, uninterrupted.trials)


@pytest.mark.usefixtures("cache")
def test_a_search_of_which_all_was_measured_ends_without_the_model(
    inputs: Inputs, request: pytest.FixtureRequest
) -> None:
    table = inputs.table()
    folder = inputs.folder(table)
    whole = interrupt(folder.path, RESULT_FILE, MEASURED, 1000, "")
    request.getfixturevalue("no_model")
    inputs.search(table)
    assert (folder / RESULT_FILE).read_bytes() == whole


@pytest.mark.usefixtures("cache")
def test_the_table_is_what_was_probed(inputs: Inputs) -> None:
    table = inputs.table()
    assert set(table.tensors) == set(quantizable(inputs.reference.header))
    for row in table.tensors.values():
        assert set(row.errors) == set(MENU)
        assert row.slope is not None
        assert row.price("Q2_K") > row.price("Q8_0") > 0
    lines = (table_folder(table) / PROBED).read_text(encoding="utf-8").splitlines()
    n_probed = sum(len(json.loads(line)["klds"]) for line in lines)
    assert table.n_tokens == 32 * n_probed


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("log", "n_lines", "torn"),
    [
        (PROBED, 0, ""),
        (PROBED, 7, '{"name": "blk.0.attn_q.weight", "types": {"blk.0.at'),
        (PROBED, 1000, ""),
        (ERRORS, 4, '["blk.0.attn_output.weight", {"errors": {"Q2_K": 0.0'),
    ],
)
def test_a_table_whose_making_was_interrupted_has_the_same_bytes(
    inputs: Inputs, log: str, n_lines: int, torn: str
) -> None:
    made = inputs.table()
    whole = interrupt(table_folder(made), TABLE_FILE, log, n_lines, torn)
    inputs.probed.clear()
    again = inputs.table()
    assert not again.outcome.cached
    assert again.path.read_bytes() == whole
    assert again.tensors == made.tensors
    assert (again.doubt, again.n_tokens, again.error_spread) == (made.doubt, made.n_tokens, made.error_spread)
    # Only what was lost is measured again.
    n_all = len((table_folder(made) / PROBED).read_text(encoding="utf-8").splitlines())
    assert len(inputs.probed) == max(0, n_all - n_lines if log == PROBED else 0)
