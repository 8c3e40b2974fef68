"""`dynrun make` and `dynrun allocate` with a known scheme, and with shards."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dynrun.allocation.search import SearchSettings
from dynrun.calibration.stage import ImatrixSettings
from dynrun.cli.make import show, to_json
from dynrun.config import Config
from dynrun.gguf.header import read_header
from dynrun.gguf.quantizable import quantizable
from dynrun.gguf.shards import read_whole_header
from dynrun.llamacpp import tools
from dynrun.make import Made, make, plan
from dynrun.models import open_reference
from dynrun.scheme import Scheme, read_scheme, write_scheme
from dynrun.sensitivity.slopes import Slope
from dynrun.sensitivity.stage import ProbeSettings
from dynrun.stages import Settings
from dynrun.target import Target
from tests.commands import Ran, dynrun
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
SETTINGS = Settings(
    imatrix=ImatrixSettings(512, 64),
    probes=ProbeSettings(n_tokens=64, n_ctx=64),
    search=SearchSettings(n_tokens=128, n_ctx=64, n_candidates=2, rounds=0),
    eval_tokens=256,
    eval_n_ctx=64,
    # test_make_feedback.py has it.
    feedback=None,
    config=Config(threads=2),
)
SMALL = ("--tokens", "512", "--ctx", "64")
EVAL = ("--eval-tokens", "512")


class Stages:
    """A front end that remembers which stages began."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def stage(self, name: str, detail: str) -> None:
        assert detail
        self.names.append(name)

    def progress(self, done: float, total: float, note: str = "") -> None:
        """Something was done."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return write_tiny_llama(folder / "base.gguf")


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Path:
    """Other weights of the same shape."""
    return write_tiny_llama(folder / "tuned.gguf", seed=1)


@pytest.fixture(scope="module")
def made(model: Path, folder: Path) -> Made:
    """The base model at 4.5 bits, measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNRUN_CACHE", str(folder / "cache"))
        return run(model, Target(bpw=4.5), folder / "base-4.gguf")[0]


@pytest.fixture
def known_cache(made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What making the base model has left, for this test alone."""
    shutil.copytree(folder / "cache", tmp_path / "cache", symlinks=True)
    monkeypatch.setenv("DYNRUN_CACHE", str(tmp_path / "cache"))


def run(
    model: Path,
    target: Target | None,
    out: Path,
    scheme: Scheme | None = None,
    settings: Settings = SETTINGS,
    split_max_size: int | None = None,
) -> tuple[Made, list[str]]:
    stages = Stages()
    done = make(
        *(str(model), target, settings, stages, lambda _: None, out), scheme=scheme, split_max_size=split_max_size
    )
    return done, stages.names


def types_in(path: Path, names: object) -> dict[str, str]:
    header = read_header(path)
    assert isinstance(names, dict)
    return {name: header.tensors[name].type for name in names}


def test_a_fine_tune_gets_its_own_types_by_the_slopes_of_the_base_without_a_probe(
    made: Made, tuned: Path, tmp_path: Path
) -> None:
    scheme = read_scheme(made.scheme_path, quantizable(read_header(tuned)))
    got, stages = run(tuned, None, tmp_path / "t.gguf", scheme)
    assert "errors" in stages
    assert not {"sensitivity", "search"} & set(stages)
    assert [one.name for one in got.stages] == ["imatrix", "errors", "search", "quantize", "stock", "evaluation"]
    assert got.file.stat().st_size == got.scheme.size_bytes <= made.scheme.budget_bytes
    assert types_in(got.file, dict(got.scheme.types)) == dict(got.scheme.types)
    assert got.scheme.source_sha256 == open_reference(str(tuned)).sha256
    assert got.chosen.table is not None
    errors = {name: row.errors for name, row in got.chosen.table.tensors.items()}
    prices = [Slope(scheme.slopes[name]).price(errors[name][one]) for name, one in got.scheme.types.items()]
    assert got.scheme.predicted_kld == pytest.approx(sum(prices))
    # The new scheme is the tuned model's own: a second run takes it as it is.
    again, stages = run(tuned, None, tmp_path / "again.gguf", got.scheme)
    assert "errors" not in stages
    assert again.file.read_bytes() == got.file.read_bytes()


def test_its_own_model_gets_the_same_file_again(made: Made, model: Path, tmp_path: Path, known_cache: None) -> None:
    scheme = read_scheme(made.scheme_path, quantizable(read_header(model)))
    for target in (None, Target(bpw=4.5)):
        got, stages = run(model, target, tmp_path / "same.gguf", scheme)
        assert not {"errors", "sensitivity", "search"} & set(stages)
        assert got.file.read_bytes() == made.file.read_bytes()
        assert got.scheme_path.read_text() == made.scheme_path.read_text()
        assert got.baseline.ftype == made.baseline.ftype


def test_another_size_is_solved_from_the_slopes(made: Made, model: Path, tmp_path: Path, known_cache: None) -> None:
    scheme = read_scheme(made.scheme_path, quantizable(read_header(model)))
    got, stages = run(model, Target(bpw=6.0), tmp_path / "six.gguf", scheme)
    assert "errors" in stages
    assert made.scheme.size_bytes < got.file.stat().st_size <= 6.0 * read_header(model).n_elements / 8
    assert (got.scheme.predicted_kld or 0.0) < (made.scheme.predicted_kld or 0.0)
    assert got.scheme.label == "6.00bpw"


def test_shards_are_within_the_budget_in_all(made: Made, model: Path, tmp_path: Path, known_cache: None) -> None:
    n_bytes = int(7.0 * read_header(model).n_elements / 8)
    scheme = read_scheme(made.scheme_path, quantizable(read_header(model)))
    out = tmp_path / "out" / "seven.gguf"
    got, stages = run(model, Target(size_bytes=n_bytes), out, scheme, split_max_size=1_100_000)
    assert stages[-2:] == ["split", "report"]
    assert len(got.files) > 1
    others = [out.with_suffix(".scheme.toml"), out.with_suffix(".report")]
    assert sorted(out.parent.iterdir()) == sorted([*got.files, *others])
    assert got.file == out.with_name(f"seven-00001-of-{len(got.files):05d}.gguf")
    assert got.size_bytes == sum(path.stat().st_size for path in got.files) <= n_bytes
    assert max(path.stat().st_size for path in got.files) <= 1_100_000
    whole = read_whole_header(got.file)
    assert {name: whole.tensors[name].type for name in got.scheme.types} == dict(got.scheme.types)


def test_the_candidates_are_shown_before_the_proof(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    show(made)
    shown = capsys.readouterr().out
    assert 0 <= shown.index("additive") < shown.index("dynrun 4.50bpw") < shown.index(f"scheme  {made.scheme_path}")
    data = to_json(made)
    assert {"additive"} < {one["name"] for one in data["candidates"]}
    assert data["candidates"][0]["kld"] == made.scheme.measured_kld
    assert 0 < data["ratio_to_runner_up"] <= 1
    assert data["size_bytes"] == made.file.stat().st_size == made.row.size_bytes


def test_the_plan_names_the_stages(made: Made, model: Path, tuned: Path, known_cache: None) -> None:
    def planned(model: Path, target: Target | None, scheme: Scheme | None = None) -> dict[str, bool]:
        return {one.name: one.cached for one in plan(str(model), target, SETTINGS, scheme=scheme, split_max_size=10**9)}

    ends = {"quantize": False, "stock preset": False, "evaluation": False, "split": False, "result": False}
    starts = {"reference": True, "imatrix": True}
    assert planned(model, Target(bpw=4.5)) == starts | {"sensitivity": True, "search": True} | ends
    assert planned(model, Target(bpw=5.0)) == starts | {"sensitivity": True, "search": False} | ends
    assert planned(model, None, made.scheme) == starts | ends
    starts["imatrix"] = False
    assert planned(tuned, None, made.scheme) == starts | {"errors": False, "allocation": False} | ends
    assert planned(tuned, Target(quant="Q4_K_M")) == starts | {"sensitivity": False, "search": False} | ends
    by_hand = Scheme({}, "mine", rules={"default": "Q4_K"})
    assert planned(tuned, None, by_hand) == starts | ends


@pytest.fixture
def by_hand(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text('[scheme]\nformat = 1\n[types]\ndefault = "Q5_K"\n"output.weight" = "Q6_K"\n')
    return path


def command(*arguments: str | Path) -> Ran:
    """Without `--json`, where ``show`` is what is tested, too."""
    return dynrun(*arguments, *SMALL)


def test_a_scheme_made_by_hand_is_made_as_it_is_and_compared(model: Path, by_hand: Path, tmp_path: Path) -> None:
    ran = command("make", model, "--scheme", by_hand, *EVAL, "--out", tmp_path / "m.gguf", "--json")
    assert ran.exit_code == 0, ran.stderr
    wanted = dict.fromkeys(quantizable(read_header(model)), "Q5_K") | {"output.weight": "Q6_K"}
    assert types_in(Path(ran.json["file"]), wanted) == wanted
    assert ran.json["files"] == [ran.json["file"]] == [str(tmp_path / "m.gguf")]
    assert 0 < ran.json["baseline"]["size_bytes"] <= ran.json["size_bytes"]
    assert (ran.json["predicted_kld"], ran.json["candidates"], ran.json["ratio_to_runner_up"]) == (None, [], None)
    assert read_scheme(Path(ran.json["scheme"])).label == "mine"
    shown = command("make", model, "--scheme", by_hand, *EVAL, "--out", tmp_path / "m.gguf")
    assert shown.exit_code == 0, shown.stderr
    assert "dynrun mine" in shown.stdout
    assert "candidate" not in shown.stdout


def test_anybodys_file_is_a_scheme_too(model: Path, tmp_path: Path) -> None:
    tools.quantize(model, "theirs.gguf", "Q3_K_M", folder=tmp_path, n_threads=1)
    ran = command("allocate", model, "--scheme", tmp_path / "theirs.gguf", "--out", tmp_path / "s.toml", "--json")
    assert ran.exit_code == 0, ran.stderr
    assert ran.json["types"] == types_in(tmp_path / "theirs.gguf", ran.json["types"])
    assert read_scheme(tmp_path / "s.toml").source == "base"
    shown = command("allocate", model, "--scheme", tmp_path / "theirs.gguf", "--out", tmp_path / "s.toml")
    assert f"{ran.json['size_bytes']:,} of " in shown.stdout


def test_what_a_scheme_cannot_do_is_refused_before_the_imatrix(
    made: Made, model: Path, by_hand: Path, tmp_path: Path
) -> None:
    deeper = write_tiny_llama(tmp_path / "deeper.gguf", n_block=3)
    ran = dynrun("make", deeper, "--scheme", made.scheme_path)
    assert ran.exit_code == 2
    assert "'blk.2.attn_k.weight' and 6 more have no type" in ran.error
    assert "imatrix" not in ran.stderr
    shallow = write_tiny_llama(tmp_path / "shallow.gguf", n_block=1)
    ran = dynrun("allocate", shallow, "--scheme", made.scheme_path)
    assert ran.exit_code == 2
    assert "no quantizable tensor 'blk.1." in ran.error
    other = tmp_path / "other.toml"
    write_scheme(replace(made.scheme, architecture="qwen2"), other)
    assert "is a llama model and the scheme is for qwen2" in dynrun("make", model, "--scheme", other).error
    assert "does not exist" in dynrun("make", model, "--scheme", tmp_path / "none.toml").error
    assert "leave out --scheme" in dynrun("allocate", model, "--curve", "--scheme", by_hand).error


def test_a_scheme_made_by_hand_is_never_over_a_wanted_size(model: Path, by_hand: Path, tmp_path: Path) -> None:
    ran = command("allocate", model, "--scheme", by_hand, "--bpw", "4.0", "--out", tmp_path / "s.toml")
    assert ran.exit_code == 5
    assert "no slopes" in ran.error
    ran = command("allocate", model, "--scheme", by_hand, "--pin", "attn_q=Q8_0", "--out", tmp_path / "s.toml")
    assert ran.exit_code == 2
    assert "no slopes" in ran.error
    assert not os.path.lexists(tmp_path / "s.toml")
