"""What goes into a report: comparisons, stored answers, metadata, the command; and how plots name and tell apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from gguf import GGUFWriter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from dynrun.artifacts import run_stage, sha256_file, stage_folder, write_json
from dynrun.cli.command_line import ARGUMENTS, command_line, without_folders
from dynrun.evaluation.compare import Named, compare
from dynrun.evaluation.kld import Continuation, Domain, Row, Score
from dynrun.llamacpp.build import Installation
from dynrun.metrics.intervals import clusters_of, mean_estimate
from dynrun.metrics.summary import summarize
from dynrun.report import compared
from dynrun.report.answers import task_results
from dynrun.report.card import card_of, front_matter
from dynrun.report.compared import compared_report
from dynrun.report.data import MADE, OTHER, STOCK, Card, Continued, Report
from dynrun.report.heatmaps import slope_maps, type_maps
from dynrun.report.labels import Named as Point
from dynrun.report.labels import name_points
from dynrun.report.plots import looks, shown_files
from dynrun.report.style import drawing, label, lay_out, look, new_figure


def gguf(path: Path, **strings: str) -> Path:
    """A file with two tensors and the metadata ``strings``, ``__`` for a dot."""
    writer = GGUFWriter(path, "llama")
    for key, value in strings.items():
        writer.add_string(key.replace("__", "."), value)
    for name in ("token_embd.weight", "blk.0.attn_q.weight"):
        writer.add_tensor(name, np.zeros((4, 256), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def row_of(path: Path, size_bytes: int, mean: float, domains: tuple[str, ...] = ("chat", "code")) -> Row:
    """A row of ten sequences, half of them of each domain."""
    klds = [np.linspace(0.5, 1.5, 20) * mean * (1 + 0.1 * i) / 1.45 for i in range(10)]

    def score(groups: list[Any]) -> Score:
        values = mean_estimate(groups)
        n = sum(map(len, groups))
        return Score(
            summarize(groups),
            mean_estimate([g < 9 for g in groups]),
            0.1,
            22,
            20,
            values,
            n,
            len(groups),
            clusters_of(groups),
        )

    parts = tuple(Domain(name, score(klds[i :: len(domains)])) for i, name in enumerate(domains))
    return Row(path, size_bytes, 4.5, score(klds), parts)


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """Of a file that dynrun made, one of somebody's, and a curve of three presets, one of them off it."""
    monkeypatch.setattr(compared, "installation", lambda: Installation(tmp_path, "f", "cpu", "0c1e570"))
    reference = gguf(tmp_path / "demo-F16.gguf", general__name="Demo", general__license="apache-2.0")
    own = gguf(tmp_path / "own.gguf", dynrun__version="0.1")
    other = gguf(tmp_path / "other.gguf", general__name="other")
    theirs = row_of(other, 1400, 0.3)
    theirs = replace(theirs, continuation=Continuation(32, (None, 3, 9, 0), theirs.score))
    files = [Named("Q3", row_of(own, 1000, 0.2), "same"), Named("Q3", theirs, "unknown")]
    stock = [(1000, 0.4, "Q3_K_M"), (1200, 0.1, "Q4_K_M"), (1300, 0.11, "Q4_1")]
    presets = [Named(ftype, row_of(other, size, mean), "same") for size, mean, ftype in stock]
    comparison = compare(reference, ["chat.jsonl", "code.jsonl"], files, presets, ["the reference is itself quantized"])
    return compared_report(comparison, "demo", commands=["dynrun compare demo own.gguf"])


def test_a_comparison_becomes_a_report(report: Report) -> None:
    assert [(f.name, f.kind) for f in report.files] == [
        *(("Q3", MADE), ("Q3 (2)", OTHER)),
        *((f"stock {name}", STOCK) for name in ("Q3_K_M", "Q4_K_M", "Q4_1")),
    ]
    assert [(p.ftype, p.on_curve) for p in report.curve] == [("Q3_K_M", True), ("Q4_K_M", True), ("Q4_1", False)]
    assert report.files[0].kld.mean == pytest.approx(0.2)
    assert [d.name for d in report.files[0].domains] == ["chat", "code"]
    assert report.files[0].equal_size is not None
    assert report.files[0].equal_size.ratio == pytest.approx(0.5)
    assert report.files[1].equal_size is not None
    assert report.files[1].equal_size.extrapolated
    assert report.files[1].imatrix == "unknown"
    # Only the pair of equal size is compared outright.
    assert [(v.name, v.other) for v in report.versus] == [("Q3", "stock Q3_K_M")]
    assert report.versus[0].ratio.value == pytest.approx(0.5)
    assert report.files[1].continued == Continued(4, 32, 0.25, 6.0)
    assert report.files[0].continued is None
    assert report.text == "chat.jsonl, code.jsonl"
    assert report.notes == ("the reference is itself quantized",)
    assert dict(report.provenance)["Reference"] == "demo-F16.gguf"
    assert dict(report.provenance)["llama.cpp"] == "0c1e570, cpu"
    assert report.files[0].types == {"token_embd.weight": "F16", "blk.0.attn_q.weight": "F16"}
    assert report.card.license == "apache-2.0"


def test_nobodys_folders_are_in_it(report: Report, tmp_path: Path) -> None:
    assert str(tmp_path) not in repr(report)
    assert str(tmp_path.parent.name) not in repr(report)


def test_a_preset_looks_like_the_file_it_is_compared_with(report: Report) -> None:
    found = looks(report)
    assert found["stock Q3_K_M"].marker == found["Q3"].marker
    assert found["stock Q4_1"].marker == found["Q3 (2)"].marker
    assert found["stock Q3_K_M"].hollow
    assert not found["Q3"].hollow
    assert [f.name for f in shown_files(report)] == ["Q3", "Q3 (2)", "stock Q3_K_M", "stock Q4_1"]
    assert len({look(index) for index in range(30)}) == 30
    assert all(look(i).marker != look(i + 1).marker for i in range(30))


# -- answers -----------------------------------------------------------------------------------------------------------


def store_run(model: Path, right: int, key: str, task: str = "mmlu", prefix: str = "") -> None:
    """A run of ten questions as `dynrun eval` stores it, the first ``right`` of them answered rightly."""
    answers = [
        {
            "id": f"q{i}",
            "subject": "s",
            "gold": 1,
            "log_p": [-2.0, -1.0 if i < right else -3.0],
            "chars": [1, 1],
            "tail": [0, 0],
        }
        for i in range(10)
    ]
    inputs = {"model": sha256_file(model), "key": key}
    data = {
        "task": task,
        "score": "acc",
        "settings": {"shots": 5, "answer_prefix": prefix},
        "model": {"name": model.name, "sha256": inputs["model"], "size_bytes": 2**30},
        "chance": 0.5,
        "elapsed_s": 1.0,
        "answers": answers,
    }

    def work(folder: Any) -> Mapping[str, Any]:
        write_json(folder / "run.json", data)
        return {}

    run_stage(stage_folder("answers", inputs), work)


def test_stored_answers_are_told_with_flips_against_the_reference(tmp_path: Path) -> None:
    reference, own, other = (gguf(tmp_path / f"{name}.gguf", general__name=name) for name in ("ref", "own", "other"))
    assert task_results(reference, {"own": own, "other": other}) == ()
    store_run(reference, 7, "1")
    assert task_results(reference, {"own": own, "other": other}) == ()
    store_run(own, 5, "2")
    store_run(other, 8, "3", prefix="The best answer is")
    store_run(own, 2, "4", task="arc_easy")
    found = {(one.task, one.name): one for one in task_results(reference, {"own": own, "other": other})}
    assert set(found) == {
        *(("MMLU 5-shot", "reference"), ("MMLU 5-shot", "own")),
        *(("MMLU 5-shot, “The best answer is”", "other"), ("arc_easy 5-shot", "own")),
    }
    own_run = found["MMLU 5-shot", "own"]
    assert (own_run.accuracy, own_run.right_to_wrong, own_run.wrong_to_right) == (0.5, 2, 0)
    assert own_run.efficiency_per_gib == pytest.approx(25.0)
    assert own_run.efficiency_per_gb == pytest.approx(25.0 / 1.073741824)
    assert found["MMLU 5-shot", "reference"].right_to_wrong is None
    # The reference was not asked in this way, and the other task has no efficiency.
    assert found["MMLU 5-shot, “The best answer is”", "other"].right_to_wrong is None
    assert found["arc_easy 5-shot", "own"].efficiency_per_gib is None


# -- the card's front matter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "repository", "wanted"),
    [
        ({"general.license": "Apache-2.0"}, "", {"license": "apache-2.0"}),
        ({"general.license": "qwen"}, "", {"license": "other", "license_name": "qwen"}),
        (
            {
                "general.license": "other",
                "general.license.name": "qwen",
                "general.license.link": "https://hf.co/q/LICENSE",
            },
            "",
            {"license": "other", "license_name": "qwen", "license_link": "https://hf.co/q/LICENSE"},
        ),
        ({"general.license": "mit", "general.license.link": "https://x.y/z"}, "", {"license": "mit"}),
        ({"general.license": 7, "general.languages": ["en", "xx-YY", 3]}, "", {"language": ["en"]}),
        ({"general.source.url": "https://huggingface.co/owner/name"}, "", {"base_model": "owner/name"}),
        # What it was tuned from is another model.
        ({"general.base_model.0.repo_url": "https://huggingface.co/owner/base"}, "", {}),
        ({"general.source.url": "https://huggingface.co/owner/name"}, "me/mine", {"base_model": "me/mine"}),
        ({"general.source.url": "https://elsewhere.example/owner/name"}, "", {}),
    ],
)
def test_the_front_matter_has_what_the_hub_takes(metadata: dict[str, Any], repository: str, wanted: Any) -> None:
    card = card_of(metadata, repository)
    data = yaml.safe_load(front_matter(Report("m", "t", 1, 1.0, (), card=card))[4:-4])
    fixed = {"library_name": "gguf", "pipeline_tag": "text-generation", "tags": data["tags"]}
    relation = {"base_model_relation": "quantized"} if "base_model" in wanted else {}
    assert data == {**fixed, **wanted, **relation}


def test_tags_are_added_once() -> None:
    data = yaml.safe_load(front_matter(Report("m", "t", 1, 1.0, (), card=Card(tags=("moe", "gguf", "no tag"))))[4:-4])
    assert data["tags"] == ["gguf", "quantized", "imatrix", "llama.cpp", "dynrun", "moe"]


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("/home/me/my models/model.gguf", "model.gguf"),
        ("~/model.gguf", "model.gguf"),
        ("../secret/model.gguf", "model.gguf"),
        ("--out=/home/me/out.gguf", "--out=out.gguf"),
        ("builtin:2,/home/me/data.jsonl:1", "builtin:2,data.jsonl:1"),
        ("C:\\Users\\me\\model.gguf", "model.gguf"),
        ("owner/repo:Q4_K_M", "owner/repo:Q4_K_M"),
        ("hf:owner/name", "hf:owner/name"),
        ("https://huggingface.co/owner/name", "https://huggingface.co/owner/name"),
        ("token_embd=Q6_K", "token_embd=Q6_K"),
    ],
)
def test_a_command_is_shown_without_folders(argument: str, shown: str) -> None:
    assert without_folders(argument) == shown


def test_the_command_is_one_that_a_shell_takes() -> None:
    before = ARGUMENTS.set(("make", "/home/me/a b.gguf", "--pin", "attn_v=Q5_K", "--json"))
    try:
        assert command_line() == ["dynrun make 'a b.gguf' --pin attn_v=Q5_K"]
        ARGUMENTS.set(())
        assert command_line() == []
    finally:
        ARGUMENTS.reset(before)


# -- plots -------------------------------------------------------------------------------------------------------------


def test_names_cover_neither_points_nor_lines_nor_each_other() -> None:
    points = [Point(i // 2 + 0.1 * (i % 2), i // 2 + 0.05 * (i % 2), f"a name {i}", "black") for i in range(8)]
    with drawing():
        figure = new_figure(4)
        axes = figure.subplots()
        (line,) = axes.plot([0, 3.2], [0, 3.2])
        lay_out(figure)
        name_points(axes, points, line)
        renderer = FigureCanvasAgg(figure).get_renderer()
        for name in axes.texts:
            name.update_positions(renderer)
        boxes = [Text.get_window_extent(name, renderer) for name in axes.texts]
    assert [name.get_text() for name in axes.texts] == [point.text for point in points]
    on_line = [(x, x) for x in np.linspace(0, 3.2, 200)]
    for x, y in axes.transData.transform([*((point.x, point.y) for point in points), *on_line]):
        assert not [box for box in boxes if box.contains(x, y)]
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    frame = axes.get_window_extent(renderer)
    assert all(frame.contains(*corner) for box in boxes for corner in box.corners())


def test_labels_are_short_and_in_letters_that_the_font_has() -> None:
    assert label("模型\x1b[0m") == "??\\x1b[0m"
    assert label("_x") == " _x"
    long = label("a" * 30 + "b" * 30)
    assert len(long) <= 34
    assert "…" in long


def test_a_deep_model_has_a_map_for_every_forty_layers() -> None:
    types = {f"blk.{i}.ffn_down.weight": "Q4_K" for i in range(90)} | {"output.weight": "Q6_K"}
    with drawing():
        maps = type_maps(types, "types-1", "Tensor types of x")
        assert [(m.name, m.title.split(", ")[1]) for m in maps] == [
            ("types-1-1", "layers 0 to 39"),
            ("types-1-2", "layers 40 to 79"),
            ("types-1-3", "layers 80 to 89"),
        ]
        assert type_maps({}, "types-1", "nothing") == []
        assert slope_maps({"output.weight": ((0.0, 0.0), (0.1, -0.01))}) == []
        assert "output.weight 0.5" in slope_maps({"output.weight": ((0.1, 0.05),)})[0].caption
