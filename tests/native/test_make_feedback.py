"""`make` with error feedback: what it says is what is in the file, and without it nothing is collected for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dynrun.gguf.header import read_header
from dynrun.gguf.tensor_types import TENSOR_TYPES
from dynrun.llamacpp import tools
from dynrun.make import Made
from dynrun.models import open_reference
from dynrun.paths import stages_dir
from dynrun.rounding.settings import FeedbackSettings
from dynrun.scheme import read_scheme
from dynrun.stages import feedback_of, read_texts, statistics
from dynrun.target import Target
from tests.commands import dynrun
from tests.native.test_make_scheme import SETTINGS, SMALL, Stages, run
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
# Enough batches of 512 tokens that one is held out.
WANTED = replace(SETTINGS, imatrix=replace(SETTINGS.imatrix, n_tokens=5120), feedback=FeedbackSettings())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "base.gguf")


def tensor_bytes(path: Path, name: str) -> bytes:
    header = read_header(path)
    tensor = header.tensors[name]
    start = header.data_offset + tensor.offset
    return path.read_bytes()[start : start + tensor.nbytes]


def check_against_the_store(made: Made) -> int:
    """Every tensor is as the store rounds it, or as llama-quantize does; how many of the first kind."""
    reference, quiet = open_reference(str(made.reference.path)), Stages()
    collected = statistics(reference, read_texts(reference, WANTED, quiet), WANTED, quiet)
    n = 0
    with feedback_of(reference, collected, WANTED) as feedback:
        assert feedback is not None
        for name, type_name in made.scheme.types.items():
            rounded = feedback.tensor(name, type_name)
            kind, found = TENSOR_TYPES[type_name], tensor_bytes(made.file, name)
            if rounded is not None:
                assert rounded.data.nbytes == len(found) == kind.nbytes(rounded.values.size)
                assert np.array_equal(np.frombuffer(found, dtype=np.uint8), rounded.data.reshape(-1)), name
                n += 1
    return n


def test_the_file_holds_the_rounded_tensors_and_says_how_they_were_made(model: Path, tmp_path: Path) -> None:
    made, stages = run(model, Target(bpw=3.5), tmp_path / "out.gguf", settings=WANTED)
    rounding = made.chosen.rounding
    assert rounding is not None
    assert rounding.feedback
    assert rounding.plain == ()
    assert rounding.kld < rounding.plain_kld
    assert check_against_the_store(made) > 5
    assert stages.index("covariance") < stages.index("imatrix") < stages.index("feedback") < stages.index("quantize")
    metadata = read_header(made.file).metadata["dynrun.feedback"]
    assert len(metadata) == 127
    assert metadata.strip() == made.scheme.feedback == read_scheme(made.scheme_path).feedback
    assert tools.complete(made.file, "a", n_predict=4, n_threads=2)


def test_a_fine_tune_is_rounded_by_its_own_activations_and_nothing_is_probed(model: Path, tmp_path: Path) -> None:
    base, _ = run(model, Target(bpw=3.5), tmp_path / "base.gguf", settings=WANTED)
    tuned = write_tiny_llama(tmp_path / "tuned.gguf", seed=1)
    made, _ = run(tuned, None, tmp_path / "out.gguf", base.scheme, settings=WANTED)
    assert [one.name for one in made.stages] == [
        *("covariance", "imatrix", "errors", "search", "feedback", "quantize", "stock", "evaluation")
    ]
    assert made.scheme.feedback
    assert made.scheme.feedback != base.scheme.feedback
    assert check_against_the_store(made) > 5


def test_without_it_nothing_is_collected_and_the_bytes_are_as_many(model: Path, tmp_path: Path) -> None:
    plain, stages = run(model, Target(bpw=3.5), tmp_path / "out.gguf", settings=replace(WANTED, feedback=None))
    assert plain.chosen.rounding is None
    assert plain.scheme.feedback == ""
    assert read_header(plain.file).metadata["dynrun.feedback"].strip() == "none"
    assert not {"covariance", "feedback"} & set(stages)
    assert not (stages_dir() / "covariance").exists()
    assert plain.size_bytes <= plain.chosen.budget.size_bytes


def test_quantize_makes_the_same_bytes_from_the_scheme_and_others_without_feedback(model: Path, tmp_path: Path) -> None:
    made, _ = run(model, Target(bpw=3.5), tmp_path / "out.gguf", settings=WANTED)
    small = (*SMALL[:1], "5120", *SMALL[2:], "--json")
    again = dynrun("quantize", model, made.scheme_path, "--out", tmp_path / "again.gguf", *small)
    assert again.exit_code == 0, again.stderr
    assert (tmp_path / "again.gguf").read_bytes() == made.file.read_bytes()
    plain = dynrun("quantize", model, made.scheme_path, "--no-feedback", "--out", tmp_path / "plain.gguf", *small)
    assert plain.exit_code == 0, plain.stderr
    assert plain.json["size_bytes"] == made.size_bytes
    assert tensor_bytes(tmp_path / "plain.gguf", "blk.0.ffn_up.weight") != tensor_bytes(
        made.file, "blk.0.ffn_up.weight"
    )
