"""The covariance: what it sums, in however many passes, and that a killed run ends as an uninterrupted one."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dynrun.calibration.collect import inputs_of
from dynrun.calibration.covariance import one_bytes, plan_passes
from dynrun.calibration.imatrix import read_imatrix
from dynrun.calibration.imatrix_stats import block_and_kind
from dynrun.calibration.relay import Relay, can_go_on, relays
from dynrun.calibration.sequences import TokenSequence
from dynrun.calibration.stage import IMATRIX_FILE, ImatrixSettings, Job, make_covariance, make_imatrix
from dynrun.errors import DoesNotFitError
from dynrun.llamacpp.graph import Activation, LayerOutput, WatchInputs
from dynrun.llamacpp.library import GgmlTensor
from dynrun.models import open_reference
from tests.tiny import write_tiny_llama
from tests.tiny_shared import write_tiny_shared

pytestmark = pytest.mark.native
N_CTX = 64


def sequences(n: int, n_tokens: int = 40) -> list[TokenSequence]:
    random = np.random.default_rng(7)
    return [TokenSequence(f"s{i}", "noise", tuple(random.integers(3, 250, n_tokens).tolist())) for i in range(n)]


def job(folder: Path, n: int = 30, *, n_expert: int = 0, **settings: int | float) -> Job:
    model = write_tiny_llama(folder / f"tiny-{n_expert}.gguf", n_expert=n_expert)
    wanted = replace(ImatrixSettings(n_tokens=n * 40, n_ctx=N_CTX, min_expert_tokens=0), **settings)  # type: ignore[arg-type]
    return Job(open_reference(str(model)), sequences(n), wanted, "noise", "none")


def inputs(
    job: Job, weight: str, *, held_out: bool | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32] | None]:
    """All rows of one input, and which expert each went to; of every eighth batch, or of the others, where it says."""
    rows, experts = [], []
    with job.engine() as engine:
        first = engine.input_of[weight]
        for i, batch in enumerate(job.batches):
            if held_out is None or held_out is (i % 8 == 7):
                engine.watch_inputs(batch, lambda a: (rows.append(a.x), experts.append(a.experts)), only=[first])
    return np.concatenate(rows), None if experts[0] is None else np.concatenate(experts)


def test_it_is_the_sum_of_outer_products_of_all_batches_but_those_held_out(tmp_path: Path) -> None:
    what = job(tmp_path, 120)
    matrices = make_covariance(what).covariance
    for name in ("blk.0.attn_k.weight", "blk.1.ffn_down.weight", "output.weight"):
        x = inputs(what, name, held_out=False)[0].astype(np.float64)
        assert np.allclose(matrices.matrix(name), x.T @ x, rtol=1e-4, atol=1e-4 * len(x)), name
        assert matrices.count(name) == len(x)
        held = inputs(what, name, held_out=True)[0]
        kept = matrices.held_out(name)
        # Every second row: more came than are kept.
        assert 128 <= len(kept) <= 256 < len(held)
        assert np.array_equal(kept, held[::2]), name


def test_its_diagonal_is_the_imatrix_where_nothing_is_held_out(tmp_path: Path) -> None:
    what = job(tmp_path, 30)
    matrices, imatrix = make_covariance(what).covariance, make_imatrix(what)
    for name in ("blk.0.attn_k.weight", "output.weight"):
        assert np.allclose(np.diag(matrices.matrix(name)), read_imatrix(imatrix.path).sums[name][0], rtol=1e-5), name
        assert matrices.held_out(name).shape == (0, len(matrices.matrix(name)))


def test_each_expert_has_its_own(tmp_path: Path) -> None:
    what = job(tmp_path, 120, n_expert=4)
    matrices = make_covariance(what).covariance
    for name in ("blk.0.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"):
        x, experts = inputs(what, name, held_out=False)
        held, held_experts = inputs(what, name, held_out=True)
        for expert in range(4):
            rows = x[experts == expert].astype(np.float64)
            assert np.allclose(matrices.matrix(name, expert), rows.T @ rows, rtol=1e-4, atol=1e-4 * len(rows)), name
            assert matrices.count(name, expert) == len(rows)
            own, kept = held[held_experts == expert], matrices.held_out(name, expert)
            assert np.array_equal(kept, own[:: 1 if len(own) <= 256 else 2]), name


def test_less_memory_means_more_passes_and_the_same_matrices(tmp_path: Path) -> None:
    what = job(tmp_path, n_expert=4)
    once = make_covariance(what)
    many = make_covariance(replace(what, settings=replace(what.settings, memory=one_bytes(512))))
    assert many.outcome.cached  # how it was computed is no part of what it is
    folder = what.folder("covariance")
    before = {name: once.covariance.matrix(name) for name in once.covariance.input_of}
    assert not (folder / "layers").exists()
    for path in folder.path.iterdir():
        path.unlink()
    many = make_covariance(replace(what, settings=replace(what.settings, memory=one_bytes(512))))
    assert (once.n_passes, many.n_passes) == (1, 15)
    assert not (folder / "layers").exists()
    for name, matrix in before.items():
        assert np.array_equal(many.covariance.matrix(name), matrix), name


@pytest.mark.parametrize("n_expert", [0, 4])
def test_further_passes_go_on_from_the_layer_before_theirs(tmp_path: Path, n_expert: int) -> None:
    what = job(tmp_path, n_expert=n_expert)
    with what.engine() as engine:
        widths = {name: (engine.weights[name].shape[0], n) for name, n in inputs_of(engine).items()}
        passes = plan_passes(widths, one_bytes(512))
        chain = relays(engine, passes, what.batches[0], tmp_path / "layers")
        of_layers = [
            (block_and_kind(units[0].input)[0], relay.start) for units, relay in zip(passes, chain, strict=True)
        ]
        assert {start for block, start in of_layers if block == 1} == {0}
        assert of_layers[-1] == (None, 1), "the output's input is that of no layer"
        assert {start for block, start in of_layers if block == 0} == {None}
        asked: list[str] = []
        last = passes[-1][0].input
        with nodes_asked(asked):
            chain[-2].watch(engine, 0, what.batches[0], lambda _: None, [passes[-2][0].input])
            first = len(asked)
            chain[-1].watch(engine, 0, what.batches[0], lambda found: asked.append(found.weight), [last])
        # There was nothing yet that the first could go on from.
        assert "attn_norm-0" in asked[:first]
        assert "result_norm" not in asked[:first], "nothing is computed behind what is wanted"
        assert asked[-1] == last
        assert not [name for name in asked[first:] if name.endswith(("-0", "-1"))], "nor what was computed before"


def test_no_pass_goes_on_behind_layers_whose_caches_it_reads(tmp_path: Path) -> None:
    what = job(tmp_path, 8)
    what = replace(what, reference=open_reference(str(write_tiny_shared(tmp_path / "shared.gguf", n_block=6))))
    with what.engine() as engine:
        widths = {name: (engine.weights[name].shape[0], n) for name, n in inputs_of(engine).items()}
        passes = plan_passes(widths, one_bytes(256))
        chain = relays(engine, passes, what.batches[0], tmp_path / "layers")
    starts = {block_and_kind(units[0].input)[0]: relay.start for units, relay in zip(passes, chain, strict=True)}
    # Blocks 4 and 5 read the caches of 2 and 3; the output's input is that of no block.
    assert starts == {0: None, 1: 0, 2: 1, 3: 2, 4: None, 5: None, None: 5}
    once = make_covariance(what).covariance
    before = {name: once.matrix(name) for name in once.input_of}
    shutil.rmtree(what.folder("covariance").path)
    many = make_covariance(replace(what, settings=replace(what.settings, memory=one_bytes(256))))
    assert many.n_passes == len(passes)
    for name, matrix in before.items():
        assert np.array_equal(many.covariance.matrix(name), matrix), name


@contextmanager
def nodes_asked(names: list[str]) -> Iterator[None]:
    """The nodes that anything is asked about, in their order."""
    with pytest.MonkeyPatch.context() as patch:
        ask = WatchInputs.ask

        def noted(self: WatchInputs, pointer: int, node: GgmlTensor) -> bool:
            names.append(node.name.decode())
            return ask(self, pointer, node)

        patch.setattr(WatchInputs, "ask", noted)
        yield


def test_a_model_that_does_not_go_on_as_it_began_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = job(tmp_path)
    with what.engine() as engine:
        wanted = ["blk.1.ffn_down.weight"]
        assert can_go_on(engine, 0, wanted, what.batches[0])
        assert not can_go_on(engine, 7, wanted, what.batches[0]), "no such layer"
        assert not can_go_on(engine, 1, wanted, what.batches[0]), "the input lies before it"
        behind = engine._behind

        def otherwise(start: LayerOutput, *rest: Any) -> Any:
            # As where a later layer reads what an earlier one has written.
            return behind(LayerOutput(start.layer, np.roll(start.value, 4)), *rest)

        monkeypatch.setattr(engine, "_behind", otherwise)
        assert not can_go_on(engine, 0, wanted, what.batches[0])


def test_a_batch_whose_layer_was_lost_begins_anew(tmp_path: Path) -> None:
    what = job(tmp_path)
    batch, wanted = what.batches[0], ["blk.1.ffn_down.weight"]
    with what.engine() as engine:
        found: list[Activation] = []
        engine.watch_inputs(batch, found.append, wanted)
        for damage in (None, b"", b"\x93NUMPY", b"PK"):
            if damage is not None:
                (tmp_path / "layers" / "layer-0").mkdir(parents=True, exist_ok=True)
                (tmp_path / "layers" / "layer-0" / "0.npy").write_bytes(damage)
            Relay(tmp_path / "layers", 0).watch(engine, 0, batch, found.append, wanted)
    assert len(found) == 5
    assert all(np.array_equal(one.x, found[0].x) for one in found)


def test_memory_for_not_even_one_matrix_is_said_before_anything_is_decoded(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError, match=r"takes 0\.00 GB.*--memory 1M"):
        make_covariance(job(tmp_path, memory=1000))


def test_one_matrix_always_fits_unless_memory_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynrun.calibration.stage._COVARIANCE_MEMORY", 1000)
    # As much as the widest takes, the ffn_down of a block: for that alone, or the three other inputs of a block.
    assert make_covariance(job(tmp_path, 8)).n_passes == 5


def test_the_imatrix_is_the_same_with_and_without_a_covariance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = job(tmp_path, n_expert=4)
    alone = make_imatrix(what).path.read_bytes()
    monkeypatch.setenv("DYNRUN_CACHE", str(tmp_path / "other"))
    make_covariance(what)
    found = make_imatrix(what)
    assert found.outcome.result["n_tokens"] == 1200
    assert found.path.read_bytes() == alone


_PROGRAM = """
import os, signal, sys
from pathlib import Path
from tests.native.test_covariance import job
from dynrun.calibration.stage import make_covariance, make_imatrix
from dataclasses import replace
what = job(Path(sys.argv[1]), 400, n_expert=4, checkpoint_s=0.0)
def until_killed(done, total, note):
    print(int(done), flush=True)
    if done >= int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
what = replace(what, progress=until_killed, settings=replace(what.settings, memory=int(sys.argv[3]) or None))
make_covariance(what) if sys.argv[2] == "covariance" else make_imatrix(what)
"""


@pytest.mark.parametrize(("stage", "memory"), [("imatrix", 0), ("covariance", 0), ("covariance", one_bytes(512))])
def test_a_run_that_was_killed_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, memory: int
) -> None:
    monkeypatch.setenv("DYNRUN_CACHE", str(tmp_path / "whole"))
    what = job(tmp_path, 400, n_expert=4)
    whole = files(what, stage)
    monkeypatch.setenv("DYNRUN_CACHE", str(tmp_path / "killed"))
    for least in (5000, 11000):
        argv = [sys.executable, "-c", _PROGRAM, str(tmp_path), stage, str(memory), str(least)]
        killed = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        seen = list(map(int, killed.stdout.split()))
        assert not what.folder(stage).complete
        # The second run went on from where the first one's last checkpoint was.
        assert (seen[0] > 600) is (least == 11000)
    # With all the memory again: of a pass over some of the matrices nothing is taken over for all of them.
    assert files(what, stage) == whole


def files(what: Job, stage: str) -> dict[str, bytes]:
    if stage == "covariance":
        make_covariance(what)
        return {path.name: path.read_bytes() for path in what.folder(stage).path.glob("*.npy")}
    make_imatrix(what)
    return {IMATRIX_FILE: (what.folder(stage) / IMATRIX_FILE).read_bytes()}


def test_text_goes_on_until_each_expert_has_its_tokens(tmp_path: Path) -> None:
    what = job(tmp_path, 60, n_expert=8)
    few = replace(what, settings=replace(what.settings, n_tokens=400))
    base = make_imatrix(few)
    assert base.n_tokens == 400
    wanted = base.least_expert_tokens + 40
    more = make_imatrix(replace(few, settings=replace(few.settings, min_expert_tokens=wanted)))
    assert 400 < more.n_tokens < 2400
    assert more.least_expert_tokens >= wanted
    assert more.short_experts == 0
    capped = make_imatrix(replace(few, settings=replace(few.settings, min_expert_tokens=10**6)))
    assert capped.n_tokens == 2400
    assert capped.short_experts == capped.n_experts == 16


def test_an_expert_that_saw_nothing_has_its_layers_mean(tmp_path: Path) -> None:
    what = job(tmp_path, 1, n_expert=64, min_expert_tokens=50)
    made = make_imatrix(what)
    imatrix = read_imatrix(made.path)
    assert made.least_expert_tokens == 0
    for name in ("blk.0.ffn_down_exps.weight", "blk.1.ffn_gate_exps.weight"):
        seen, mean = imatrix.seen[name], imatrix.mean(name)
        assert mean is not None
        x, _ = inputs(what, name)
        layer = (x.astype(np.float64) ** 2).mean(axis=0)
        assert np.allclose(mean[seen == 0], layer, rtol=1e-4), name
