"""Tensors rounded with feedback on disk: found again, continued, left plain where that is better, taken over as is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dynrun.artifacts import link_or_copy, sha256_file
from dynrun.calibration.covariance import Covariance
from dynrun.calibration.imatrix import read_imatrix, write_imatrix
from dynrun.calibration.stage import (
    IMATRIX_FILE,
    CovarianceStage,
    ImatrixSettings,
    ImatrixStage,
    Job,
    make_covariance,
    make_imatrix,
)
from dynrun.config import Config
from dynrun.gguf.header import Header, read_header
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.rewrite import rewrite
from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp import tools
from dynrun.llamacpp.library import ggml
from dynrun.models import Reference, open_reference
from dynrun.rounding.choice import PLAIN, Choice
from dynrun.rounding.settings import FeedbackSettings
from dynrun.rounding.store import Feedback, Rounded, feedback_folder, open_feedback
from tests.native.test_covariance import sequences
from tests.native.test_feedback import dequantized
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
Rows = npt.NDArray[np.float32]
SETTINGS = FeedbackSettings(strengths=(0.25, 4.0), n_rows=16, n_experts=2)
QUERY, VALUE, OUTPUT = "blk.0.attn_q.weight", "blk.0.attn_v.weight", "output.weight"
UP, UP_EXPERTS, GATE_EXPERTS = "blk.0.ffn_up.weight", "blk.0.ffn_up_exps.weight", "blk.0.ffn_gate_exps.weight"
CHOICES, STRENGTHS = "choices.jsonl", "strengths.jsonl"
# Enough for nine batches, of which the eighth is held out.
N_SEQUENCES, N_TOKENS = 130, 16
UNSEEN = 2


@dataclass(frozen=True)
class Statistics:
    """A model and what feedback reads of its inputs."""

    reference: Reference
    imatrix: ImatrixStage
    covariance: CovarianceStage

    def open(self, settings: FeedbackSettings = SETTINGS, **given: int) -> AbstractContextManager[Feedback]:
        return open_feedback(self.reference, self.imatrix, self.covariance, settings, **{"n_threads": 2, **given})

    def rows(self, name: str) -> Rows:
        return WeightFile(self.reference.path).rows(name)

    def plain(self, name: str, type_name: str, expert: int = 0) -> Rows:
        """The matrix of an expert as ggml rounds it."""
        importance, kind = read_imatrix(self.imatrix.path).mean(name), TENSOR_TYPES[type_name]
        assert importance is not None
        rows = self.rows(name).reshape(len(importance), -1, importance.shape[1])[expert]
        ggml().ggml_quantize_init(kind.ggml_id)
        return decoded(type_name, ggml().quantize(kind.ggml_id, rows, importance[expert].astype(np.float32)), rows)

    def output_error(self, name: str, values: Rows, expert: int = 0) -> float:
        """Of a matrix of an expert, on what was held out."""
        rows = self.rows(name).reshape(-1, *values.shape)[expert]
        return float(np.square(self.covariance.covariance.held_out(name, expert) @ (rows - values).T).sum())


def decoded(type_name: str, data: npt.NDArray[np.uint8], like: Rows) -> Rows:
    return dequantized(type_name, data.reshape(len(like), -1), like.shape[1])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for other threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def collected(folder: Path, **shape: int) -> Statistics:
    """Of a tiny model, on noise; in a cache of its own."""
    path = write_tiny_llama(folder / "tiny.gguf", **shape)  # type: ignore[arg-type]
    wanted = ImatrixSettings(n_tokens=N_SEQUENCES * N_TOKENS, n_ctx=64, min_expert_tokens=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNRUN_CACHE", str(folder / "cache"))
        reference = open_reference(str(path))
        job = Job(reference, sequences(N_SEQUENCES, N_TOKENS), wanted, "noise", "none", Config(threads=1))
        covariance = make_covariance(job)
        return Statistics(reference, make_imatrix(job), covariance)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return collected(tmp_path_factory.mktemp("dense"), n_block=1, n_ff=256)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    """Of four experts, one of which never saw a token."""
    folder = tmp_path_factory.mktemp("experts")
    whole = collected(folder, n_block=1, n_ff=256, n_expert=4)

    def unseen(what: str, values: npt.NDArray[Any]) -> None:
        values[UNSEEN] = np.nan if what == "held" else 0

    of_experts = {name for name in whole.covariance.covariance.input_of.values() if "_exps" in name}
    found = changed(whole, folder / "changed", of_experts, unseen)
    imatrix = read_imatrix(whole.imatrix.path)
    seen = {name: counts * (np.arange(len(counts)) != UNSEEN) for name, counts in imatrix.counts.items()}
    sums = {name: values * (seen[name] > 0)[:, None] for name, values in imatrix.sums.items()}
    path = folder / "changed" / IMATRIX_FILE
    write_imatrix(replace(imatrix, sums=sums, counts=seen, seen={}), path)
    return replace(found, imatrix=replace(whole.imatrix, path=path, sha256=sha256_file(path)))


def changed(
    base: Statistics, folder: Path, inputs: Collection[str], change: Callable[[str, npt.NDArray[Any]], None]
) -> Statistics:
    """The same with other matrices: ``change`` gets ``sums``, ``counts`` and ``held`` of ``inputs`` to write into."""
    shutil.copytree(base.covariance.covariance.folder, folder)
    for name in inputs:
        for path in folder.glob(f"{name}.*.npy"):
            values = np.load(path)
            change(path.name.split(".")[-2], values)
            np.save(path, values)
    covariance = Covariance(folder, base.covariance.covariance.input_of)
    return replace(base, covariance=replace(base.covariance, covariance=covariance, key=folder.name))


def tensor(feedback: Feedback, name: str, type_name: str) -> Rounded:
    found = feedback.tensor(name, type_name)
    assert found is not None
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_tensor_is_rounded_once_and_then_found(dense: Statistics) -> None:
    with dense.open() as feedback:
        made = tensor(feedback, QUERY, "Q4_K")
        choice, folder = feedback.choice(QUERY, "Q4_K"), feedback.folder.path
        again = tensor(feedback, QUERY, "Q4_K")
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.npy")}
    lines = (folder / CHOICES).read_text()
    with dense.open() as feedback:
        found = tensor(feedback, QUERY, "Q4_K")
        assert feedback.choice(QUERY, "Q4_K") == choice
    for other in (again, found):
        assert np.array_equal(other.data, made.data)
        assert np.array_equal(other.values, made.values)
    assert {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.npy")} == before
    assert len(before) == 1
    assert (folder / CHOICES).read_text() == lines
    assert len(lines.splitlines()) == 1


def test_its_bytes_are_the_types_and_better_on_what_was_held_out(dense: Statistics) -> None:
    with dense.open() as feedback:
        for name, type_name in ((QUERY, "Q3_K"), (VALUE, "IQ3_XXS"), (OUTPUT, "Q4_0")):
            made, rows = tensor(feedback, name, type_name), dense.rows(name)
            assert made.data.nbytes == TENSOR_TYPES[type_name].nbytes(rows.size)
            assert np.array_equal(made.values, decoded(type_name, made.data, rows))
            gain = dense.output_error(name, made.values) / dense.output_error(name, dense.plain(name, type_name))
            # All rows gain about as much as those that were looked at.
            assert gain < 1
            assert gain == pytest.approx(feedback.choice(name, type_name).ratio, abs=0.1)


def test_tensors_that_read_one_input_share_a_strength(dense: Statistics) -> None:
    with dense.open() as feedback:
        choices = [feedback.choice(name, type_name) for name in (VALUE, QUERY) for type_name in ("Q4_0", "Q3_K")]
        assert {choice.strength for choice in choices} <= set(SETTINGS.strengths)
        assert len({choice.strength for choice in choices}) == 1
        assert len((feedback.folder / STRENGTHS).read_text().splitlines()) == 1


def test_other_settings_have_another_folder(dense: Statistics) -> None:
    other = replace(SETTINGS, damping=1e-2)
    folders = [feedback_folder(dense.reference, dense.imatrix, dense.covariance, one) for one in (SETTINGS, other)]
    assert folders[0].path != folders[1].path


def test_what_a_killed_run_left_is_continued_to_the_same_bytes(dense: Statistics) -> None:
    wanted = [(QUERY, "Q3_K"), (VALUE, "Q4_0"), (VALUE, "IQ4_NL"), (OUTPUT, "Q4_0")]
    with dense.open() as feedback:
        for name, type_name in wanted:
            tensor(feedback, name, type_name)
        folder = feedback.folder.path
    whole = files(folder)
    for name in sorted(whole)[::2]:
        if name.endswith(".npy"):
            (folder / name).unlink()
    for name in (CHOICES, STRENGTHS):
        (folder / name).write_bytes(whole[name][: len(whole[name]) * 2 // 3])
        assert not (folder / name).read_bytes().endswith(b"\n")
    (folder / f".{QUERY}.Q3_K.npy.x.part").write_bytes(b"half")
    with dense.open() as feedback:
        # Not in the order of the first run.
        for name, type_name in reversed(wanted):
            tensor(feedback, name, type_name)
    found = files(folder)
    for name in (CHOICES, STRENGTHS):
        assert sorted(found.pop(name).splitlines()) == sorted(whole.pop(name).splitlines())
    assert found == whole


def test_neither_threads_nor_memory_nor_what_is_asked_for_together_change_a_byte(
    experts: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = ["Q3_K", "Q4_0", "IQ3_XXS", "IQ4_NL"]
    n = experts.reference.header.tensors[UP_EXPERTS].shape[0]
    found = []
    # Seven matrices are what one factor of an expert's input takes while it is made.
    for given in ({"n_threads": 1}, {"n_threads": 3}, {"n_threads": 3, "memory": 7 * n * n * 4}):
        monkeypatch.setenv("DYNRUN_CACHE", str(tmp_path / str(len(found))))
        with experts.open(**given) as feedback:
            if found:
                feedback.choices(UP_EXPERTS, types)
            for type_name in types:
                tensor(feedback, UP_EXPERTS, type_name)
            found.append(files(feedback.folder.path))
    assert found[0] == found[1] == found[2]
    assert len(found[0][CHOICES].splitlines()) == len(types)


@pytest.mark.parametrize(("name", "type_name"), [(UP_EXPERTS, "IQ3_XXS"), (GATE_EXPERTS, "Q3_K")])
def test_every_expert_is_rounded_by_its_own_inputs(experts: Statistics, name: str, type_name: str) -> None:
    with experts.open() as feedback:
        made = tensor(feedback, name, type_name)
    rows = experts.rows(name)
    assert np.array_equal(made.values, decoded(type_name, made.data, rows))
    assert np.isfinite(made.values).all()
    for expert, values in enumerate(made.values.reshape(4, -1, rows.shape[1])):
        plain, own = experts.plain(name, type_name, expert), rows.reshape(4, *values.shape)[expert]
        if expert == UNSEEN:
            # No column counts more than another, nothing is known that one could make up for another's error.
            assert np.square(own - values).sum() <= np.square(own - plain).sum() * (1 + 1e-5)
        else:
            gain = experts.output_error(name, values, expert) / experts.output_error(name, plain, expert)
            assert gain < 1, expert


def test_a_tensor_is_left_to_plain_rounding_where_feedback_does_not_help(dense: Statistics, tmp_path: Path) -> None:
    random = np.random.default_rng(5)

    def unrelated(what: str, values: npt.NDArray[Any]) -> None:
        if what == "counts":
            values[:] = 10**7
        elif what == "sums":
            directions = random.standard_normal((3, 256))
            values[:] = (directions.T @ directions + 0.1 * np.eye(256))[np.tri(256, dtype=bool)]
        else:
            # Of no direction: what counts is the error of every column, which feedback pays with.
            values[:] = random.standard_normal((256, 256))

    other = changed(dense, tmp_path / "unrelated", [QUERY], unrelated)
    with other.open() as feedback:
        for name, type_name in ((QUERY, "Q4_0"), (VALUE, "Q4_0")):
            assert feedback.choice(name, type_name) == PLAIN
            assert feedback.tensor(name, type_name) is None
        lines = (feedback.folder / CHOICES).read_text()
        # What reads another input is not concerned.
        assert feedback.tensor(OUTPUT, "Q4_0") is not None
    with other.open() as feedback:
        assert feedback.tensor(QUERY, "Q4_0") is None
        assert (feedback.folder / CHOICES).read_text().startswith(lines)
        assert [path.name for path in feedback.folder.path.glob("*.npy")] == [f"{OUTPUT}.Q4_0.npy"]


def test_where_nothing_was_held_out_the_middle_strength_is_taken(dense: Statistics, tmp_path: Path) -> None:
    def nothing(what: str, values: npt.NDArray[Any]) -> None:
        if what == "held":
            values[:] = np.nan

    other = changed(dense, tmp_path / "nothing", [QUERY], nothing)
    with other.open(replace(SETTINGS, strengths=(8.0, 0.5, 2.0))) as feedback:
        assert feedback.choice(QUERY, "Q4_0") == Choice(2.0, 1.0)
        assert np.isfinite(tensor(feedback, QUERY, "Q4_0").values).all()


@pytest.mark.parametrize(
    ("name", "type_name"),
    [
        ("token_embd.weight", "Q4_0"),
        ("blk.0.attn_norm.weight", "Q8_0"),
        (QUERY, "F16"),
        (QUERY, "BF16"),
        (QUERY, "F32"),
    ],
)
def test_tensors_without_a_covariance_and_full_precision_have_no_feedback(
    dense: Statistics, name: str, type_name: str
) -> None:
    with dense.open() as feedback:
        assert not feedback.applies(name, type_name)
        assert feedback.choice(name, type_name) == PLAIN
        assert feedback.tensor(name, type_name) is None
        assert list(feedback.folder.path.iterdir()) == []


# -- llama-quantize takes it as it is ----------------------------------------------------------------------------------


def quantize(model: Statistics, source: Path, folder: Path, types: Mapping[str, str]) -> Header:
    folder.mkdir()
    link_or_copy(model.imatrix.path, folder / IMATRIX_FILE)
    tools.write_tensor_types(types, folder / "types.txt")
    tools.quantize(
        source,
        "model.gguf",
        "Q4_K_M",
        folder=folder,
        n_threads=1,
        imatrix=IMATRIX_FILE,
        tensor_type_file="types.txt",
    )
    return read_header(folder / "model.gguf")


def bytes_of(header: Header, name: str) -> bytes:
    start = header.data_offset + header.tensors[name].offset
    return header.path.read_bytes()[start : start + header.tensors[name].nbytes]


@pytest.mark.parametrize(("model", "up"), [("dense", UP), ("experts", UP_EXPERTS)])
def test_llama_quantize_copies_what_is_in_its_type_already(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, up: str
) -> None:
    it: Statistics = request.getfixturevalue(model)
    rounded = {QUERY: "Q3_K", up: "IQ4_XS", OUTPUT: "Q6_K"}
    types = {**dict.fromkeys(quantizable(it.reference.header), "Q4_K"), **rounded}
    with it.open() as feedback:
        made = {name: tensor(feedback, name, type_name).data for name, type_name in rounded.items()}
    rewrite(it.reference.header, tmp_path / "rounded.gguf", rounded, made.__getitem__)
    out = quantize(it, tmp_path / "rounded.gguf", tmp_path / "feedback", types)
    plain = quantize(it, it.reference.path, tmp_path / "plain", types)
    start = [header.path.read_bytes()[: header.data_offset] for header in (out, plain)]
    assert start[0] == start[1]
    for name, info in out.tensors.items():
        assert info.type == types.get(name, info.type)
        expected = made[name].tobytes() if name in made else bytes_of(plain, name)
        assert bytes_of(out, name) == expected, name
        assert (bytes_of(out, name) == bytes_of(plain, name)) is (name not in made)
