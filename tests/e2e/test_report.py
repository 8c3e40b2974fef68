"""The report of a comparison, as a user asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynrun.report.folder import read_report
from dynrun.scheme import read_scheme
from tests.commands import dynrun
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.e2e
CALIBRATION = ("--tokens", "1024", "--n-ctx", "128")


def test_compare_writes_a_report_of_files_and_curve(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny$_<b>.gguf", n_vocab=512)
    out, folder = tmp_path / "mine|4.gguf", tmp_path / "report"
    quick = ("--probe-tokens", "128", "--candidates", "0", "--no-feedback", "--eval-tokens", "1024")
    made = dynrun("make", model, "--quant", "Q4_K_M", *CALIBRATION, *quick, "--out", out, "--json")
    assert made.exit_code == 0, made.stderr
    presets = ("--presets", "Q3_K_M,Q4_K_M,Q6_K", "--eval-tokens", "1024")
    ran = dynrun("compare", model, out, *presets, *CALIBRATION, "--report", folder, "--json")
    assert ran.exit_code == 0, ran.stderr
    assert Path(ran.json["report"]) == folder / "report.html"
    assert f"report: {folder / 'report.html'}" in ran.stderr
    assert [Path(plot).stem for plot in ran.json["plots"]] == [
        *("kld-size", "kld-domains", "kld-percentiles", "types-1", "slopes")
    ]
    assert all(Path(plot).is_file() for plot in ran.json["plots"])
    report = read_report(folder)
    assert [(file.name, file.kind) for file in report.files] == [
        *(("mine|4", "dynrun"), ("stock Q3_K_M", "stock"), ("stock Q4_K_M", "stock"), ("stock Q6_K", "stock"))
    ]
    (row,) = ran.json["rows"]
    found = report.files[0]
    assert (found.kld.mean, found.size_bytes, found.imatrix) == (row["kld"]["mean"], out.stat().st_size, "same")
    assert found.equal_size is not None
    assert found.equal_size.ratio == row["equal_size_ratio"]
    # The same text as make's, so the same number.
    assert row["kld"]["mean"] == made.json["kld"]["mean"]
    assert report.slopes == read_scheme(Path(made.json["scheme"])).slopes
    (command,) = report.commands
    assert command.startswith("dynrun compare 'tiny$_<b>.gguf' 'mine|4.gguf' --presets Q3_K_M,Q4_K_M,Q6_K")
    assert str(tmp_path) not in (folder / "report.html").read_text() + (folder / "README.md").read_text()
