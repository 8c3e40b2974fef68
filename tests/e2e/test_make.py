"""`dynrun make` and its single stages, as a user runs them."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from dynrun.gguf.header import read_header
from dynrun.gguf.quantizable import quantizable
from dynrun.llamacpp import tools
from dynrun.report.folder import read_report
from dynrun.scheme import Scheme, read_scheme
from tests.commands import dynrun
from tests.disturbed import disturbed
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.e2e
SMALL = ("--tokens", "1024", "--ctx", "128", "--probe-tokens", "128")
EVAL = ("--eval-tokens", "1024")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf", n_block=2, n_vocab=512)


def check_report(out: Path, made: Any, scheme: Scheme, command: str) -> None:
    """The report beside the file says what `--json` said."""
    report = read_report(out.with_suffix(".report"))
    assert report.files[0].kld.mean == made["kld"]["mean"]
    assert [file.kind for file in report.files] == ["dynrun", "stock"]
    assert report.files[0].types == dict(scheme.types)
    assert set(report.slopes) == set(scheme.slopes)
    assert report.versus[0].ratio.value == made["kld_ratio"]
    assert len(report.files[0].domains) > 1
    assert report.commands == (command,)


def test_make_gives_a_file_of_the_presets_size_that_stands_closer_to_the_reference(
    demo_model: Path, tmp_path: Path
) -> None:
    """The built-in model with a sixteenth of the usual probe tokens: the whole pipeline on real weights.

    Without types of grids, which take most of the time to search and to round; test_make_works_on_any_llama has them.
    """
    out = tmp_path / "demo.gguf"
    settings = ("--tokens", "4096", "--ctx", "256", "--probe-tokens", "64", "--eval-tokens", "2048")
    settings += ("--candidates", "3", "--rounds", "1", "--types", "Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,Q8_0,IQ4_XS")
    ran = dynrun("make", demo_model, "--quant", "Q3_K_M", "--out", out, *settings, "--json")
    assert ran.exit_code == 0, ran.stderr
    made = ran.json
    assert Path(made["file"]) == out
    assert 0.995 * made["baseline"]["size_bytes"] <= made["size_bytes"] <= made["baseline"]["size_bytes"]
    assert made["size_bytes"] == out.stat().st_size
    assert made["kld_ratio"] < 0.35
    assert made["feedback"]["kept"]
    assert made["feedback"]["ratio_ci95"][1] < 0.8
    assert made["kld"]["ci95"][0] < made["kld"]["mean"] < made["kld"]["ci95"][1] < made["baseline"]["kld"]["ci95"][0]
    assert [stage["name"] for stage in made["stages"]] == [
        *("covariance", "imatrix", "sensitivity", "search", "feedback", "quantize", "stock", "evaluation")
    ]
    scheme = read_scheme(Path(made["scheme"]), quantizable(read_header(demo_model)))
    header = read_header(out)
    assert {name: header.tensors[name].type for name in scheme.types} == dict(scheme.types)
    assert header.metadata["dynrun.label"] == "Q3_K_M"
    assert header.metadata["dynrun.feedback"].strip() == scheme.feedback
    assert re.fullmatch("[0-9a-f]{64}", header.metadata["dynrun.scheme.sha256"])
    assert "/" not in header.metadata["quantize.imatrix.file"]
    assert tools.complete(out, "The capital of France is", n_predict=8, n_threads=2).strip()
    check_report(
        out, made, scheme, f"dynrun make {demo_model.name} --quant Q3_K_M --out demo.gguf {' '.join(settings)}"
    )
    page = Path(made["report"]).read_bytes()
    assert str(tmp_path).encode() not in page + Path(made["card"]).read_bytes()
    cached = dynrun("make", demo_model, "--quant", "Q3_K_M", "--out", out, *settings, "--json").json
    assert all(stage["cached"] for stage in cached["stages"])
    assert cached["kld"] == made["kld"]
    assert Path(cached["report"]).read_bytes() == page


@pytest.mark.parametrize("n_expert", [0, 4])
@pytest.mark.parametrize("wanted", [("--quant", "Q4_K_M"), ("--quant", "IQ2_XXS"), ("--bpw", "5.5")])
def test_make_works_on_any_llama(tmp_path: Path, n_expert: int, wanted: Sequence[str]) -> None:
    model = write_tiny_llama(tmp_path / "m.gguf", n_expert=n_expert, n_vocab=512)
    out = tmp_path / "out.gguf"
    ran = dynrun("make", model, *wanted, *SMALL, *EVAL, "--out", out, "--json")
    assert ran.exit_code == 0, ran.stderr
    assert ran.json["size_bytes"] == out.stat().st_size
    assert tools.complete(out, "a", n_predict=4, n_threads=2)
    if wanted[0] == "--bpw":
        assert ran.json["bpw"] <= 5.5
        assert ran.json["baseline"]["size_bytes"] <= 5.5 * read_header(model).n_elements / 8


def left_of(folder: Path) -> list[psutil.Process]:
    """Running programs that were given a file in ``folder``."""
    found = psutil.process_iter(["cmdline"])
    return [one for one in found if any(str(folder) in word for word in one.info["cmdline"] or ())]


def test_killed_at_any_moment_and_run_again_it_ends_with_the_same_bytes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["make", str(tiny), "--quant", "Q3_K_M", *SMALL, *EVAL, "--out"]
    monkeypatch.setenv("DYNRUN_CACHE", str(tmp_path / "undisturbed"))
    assert dynrun(*arguments, tmp_path / "whole.gguf").exit_code == 0
    monkeypatch.setenv("DYNRUN_CACHE", str(tmp_path / "killed"))
    chance = random.Random(2)  # noqa: S311
    out = tmp_path / "killed.gguf"
    # Of the 800 times that a whole run writes or renames something.
    for moment in (chance.randint(10, 120) for _ in range(8)):
        killed = dynrun(*arguments, out, program=disturbed(f"kill:{moment}", "/stages/|/killed[.]"))
        assert killed.exit_code == -signal.SIGKILL, killed.stderr
        _, alive = psutil.wait_procs(left_of(tmp_path), timeout=30)
        assert not alive
    assert dynrun(*arguments, out).exit_code == 0
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert out.with_suffix(".scheme.toml").read_text() == (tmp_path / "whole.scheme.toml").read_text()


def test_the_stages_one_by_one_end_with_the_same_file(tiny: Path, tmp_path: Path) -> None:
    imatrix = dynrun("imatrix", tiny, *SMALL[:4], "--out", tmp_path / "i.gguf", "--json")
    assert imatrix.exit_code == 0, imatrix.stderr
    assert Path(imatrix.json["path"]).is_file()
    sensitivity = dynrun("sensitivity", tiny, *SMALL, "--json")
    assert sensitivity.exit_code == 0, sensitivity.stderr
    assert set(sensitivity.json["tensors"]) == set(quantizable(read_header(tiny)))
    lines = Path(sensitivity.json["log"]).read_text().splitlines()
    probed = {line.split()[0] for line in lines if "KLD" in line}
    assert probed == set(sensitivity.json["tensors"])
    scheme = tmp_path / "s.toml"
    allocated = dynrun("allocate", tiny, "--quant", "Q4_K_M", *SMALL, "--out", scheme, "--json")
    assert allocated.exit_code == 0, allocated.stderr
    quantized = dynrun("quantize", tiny, scheme, *SMALL[:4], "--out", tmp_path / "q.gguf", "--json")
    assert quantized.exit_code == 0, quantized.stderr
    assert quantized.json["size_bytes"] == allocated.json["size_bytes"] == (tmp_path / "q.gguf").stat().st_size
    made = dynrun("make", tiny, "--quant", "Q4_K_M", *SMALL, *EVAL, "--out", tmp_path / "m.gguf", "--json")
    assert made.exit_code == 0, made.stderr
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "q.gguf").read_bytes()
    rows = dynrun("eval", "kld", tiny, tmp_path / "m.gguf", "--tokens", "1024", "--json").json["rows"]
    assert rows[0]["kld"]["mean"] == pytest.approx(made.json["kld"]["mean"])


def test_a_dry_run_does_nothing_and_shows_commands(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    ran = dynrun("make", tiny, "--quant", "Q4_K_M", *SMALL, "--out", out, "--dry-run")
    assert ran.exit_code == 0, ran.stderr
    assert "llama-quantize --imatrix imatrix.gguf --tensor-type-file tensor-types.txt" in ran.stdout
    assert "to do" in ran.stdout
    assert not out.exists()
    dynrun("imatrix", tiny, *SMALL[:4])
    stages = {
        s["name"]: s for s in dynrun("make", tiny, "--quant", "Q4_K_M", *SMALL, "--dry-run", "--json").json["stages"]
    }
    assert stages["imatrix"]["cached"] is True
    assert stages["sensitivity"]["cached"] is False
    assert re.search(r"[\d,]+ bytes", stages["search"]["detail"])
