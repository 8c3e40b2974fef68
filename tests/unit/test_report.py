"""A report's page and card: what they say, what they escape, and that they are the same for the same data."""

from __future__ import annotations

import html.parser
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from dynrun.errors import NotFoundError, UsageError
from dynrun.metrics.equal_size import EqualSize
from dynrun.metrics.intervals import Ratio
from dynrun.metrics.summary import Summary
from dynrun.report.data import (
    MADE,
    OTHER,
    STOCK,
    Card,
    Continued,
    CurvePoint,
    Domain,
    FileResult,
    Report,
    TaskResult,
    Versus,
)
from dynrun.report.folder import Written, read_report, write_report
from dynrun.report.plots import domain_plot

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "[x](javascript:alert(1)) ![i](http://evil.example/x.png)",
    "a|b\n| c |",
    "`tick` $\\frac{1}{0}$ ~~~",
    "\x1b[31mred\u202egnp.exe",
    "_under",
    "模型 {{ 7*7 }} {% raw %}",
    "--- \nlicense: mit",
)


def result(name: str, kind: str, size_bytes: int, mean: float) -> FileResult:
    spread = Summary(mean, (mean * 0.9, mean * 1.1), mean * 0.4, mean * 2, mean * 8, mean * 20, mean * 60)
    domains = tuple(
        Domain(d, 500, mean * f, (mean * f * 0.8, mean * f * 1.2)) for d, f in (("chat", 0.8), ("code", 1.3))
    )
    return FileResult(name, f"{name}.gguf", kind, size_bytes, 4.4, spread, 0.77, 0.08, 30.2, domains, imatrix="same")


@pytest.fixture(scope="module")
def report() -> Report:
    types = {"token_embd.weight": "Q4_K", "blk.0.attn_q.weight": "Q3_K", "blk.1.attn_q.weight": "IQ4_XS"}
    own = replace(result("dynrun Q3_K_M", MADE, 118_000_000, 0.16), types=types, sha256="ab" * 32)
    own = replace(own, continued=Continued(40, 32, 0.375, 11.5))
    other = replace(result("theirs", OTHER, 131_000_000, 0.14), equal_size=EqualSize(1.051, 0.133, True))
    stock = [result("stock Q3_K_M", STOCK, 118_000_000, 0.47), result("stock Q4_K_M", STOCK, 136_000_000, 0.1)]
    return Report(
        model="demo",
        text="test conversations",
        n_tokens=16351,
        ppl_reference=21.3,
        files=(own, other, *stock),
        curve=tuple(CurvePoint(f.name.removeprefix("stock "), f.size_bytes, f.kld.mean) for f in stock),
        versus=(Versus("dynrun Q3_K_M", "stock Q3_K_M", Ratio(0.371, (0.36, 0.383))),),
        tasks=(TaskResult("MMLU 5-shot", "dynrun Q3_K_M", 0.31, (0.28, 0.34), 1000, 118_000_000, 54.6, 50.8, 12, 9),),
        slopes={
            "blk.0.attn_q.weight": ((0.01, 0.002), (0.02, 0.006), (0.1, 0.05)),
            "token_embd.weight": ((0.02, 0.1),),
        },
        provenance=(("llama.cpp", "0c1e570"),),
        commands=("dynrun make demo --quant Q3_K_M",),
        card=Card(base_model="owner/demo", license="apache-2.0", languages=("en",)),
    )


@pytest.fixture(scope="module")
def written(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_report(report, tmp_path_factory.mktemp("report"))


def hostile(report: Report) -> Report:
    """The same report, its every word out of somebody's file."""
    files = tuple(
        replace(
            file,
            name=f"{name}{i}",
            file=name,
            imatrix=name,
            domains=tuple(replace(d, name=f"{d.name}{name}") for d in file.domains),
        )
        for i, (file, name) in enumerate(zip(report.files, HOSTILE, strict=False))
    )
    types = {f"blk.0.{name}.weight": "Q4_K" for name in HOSTILE} | dict.fromkeys(HOSTILE, "Q8_0")
    words = " ".join(HOSTILE)
    return replace(
        report,
        model=words,
        text=words,
        files=(replace(files[0], types=types), *files[1:]),
        curve=tuple(replace(point, ftype=words) for point in report.curve),
        versus=tuple(Versus(name, words, Ratio(1.0, (0.9, 1.1))) for name in HOSTILE),
        tasks=tuple(replace(report.tasks[0], task=name, name=name) for name in HOSTILE[:2]),
        slopes={f"blk.0.{name}.weight": ((0.1, 0.1),) for name in HOSTILE},
        provenance=tuple((name, name) for name in HOSTILE),
        commands=HOSTILE,
        notes=HOSTILE,
        card=Card(base_model=words, license=words, license_name=words, languages=HOSTILE, tags=HOSTILE),
    )


class Elements(html.parser.HTMLParser):
    """All start tags with their attributes, and the text outside of pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self.inside = "", 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside += tag in ("svg", "style")

    def handle_endtag(self, tag: str) -> None:
        self.inside -= tag in ("svg", "style")

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.words += data


def table_rows(card: str) -> list[list[str]]:
    """The tables of the card as a Markdown parser of the GitHub kind sees them."""
    rows: list[list[str]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(body(card)):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows and token.level >= 3:
            rows[-1].append("".join(child.content for child in token.children or []))
    return rows


def body(card: str) -> str:
    return card.split("\n---\n", 1)[1]


def test_the_page_stands_alone(written: Written) -> None:
    text = written.page.read_text(encoding="utf-8")
    page = Elements(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "a"}
    assert not re.search(r"@import|url\((?!#)|font-face", text)
    assert "default-src 'none'" in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 50
    targets = {value for _, a in page.tags for key, value in a.items() if key.endswith("href") and value}
    # The bars of colours are bitmaps.
    assert all(target.startswith("data:image/png;base64,") or target[1:] in ids for target in targets)
    for picture in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(picture)  # noqa: S314 - our own
    assert text.count("<svg") == text.count("<figure") == len(written.plots) == 6
    labels = [a["aria-label"] for tag, a in page.tags if tag == "figure"]
    assert all(labels)


def test_page_and_card_say_the_same(written: Written, report: Report) -> None:
    page, card = Elements(written.page.read_text(encoding="utf-8")), written.card.read_text(encoding="utf-8")
    rows = table_rows(card)
    assert ["dynrun Q3_K_M", "118.0 MB", "4.40", "0.1600 (0.1440–0.1760)", "–", "same"] in rows
    assert ["theirs", "131.0 MB", "4.40", "0.1400 (0.1260–0.1540)", "1.051 extrapolated", "same"] in rows
    assert ["dynrun Q3_K_M", "0.1280", "0.2080"] in rows
    assert ["dynrun Q3_K_M", "40", "32", "38%", "11.5"] in rows
    answers = ["MMLU 5-shot", "1,000", "31.00% (28.00%–34.00%)", "12", "9"]
    sizes = ["0.110 GiB (0.118 GB)", "54.60 per GiB (50.80 per GB)"]
    assert ["dynrun Q3_K_M", *answers, *sizes] in rows
    assert ["dynrun Q3_K_M", "dynrun Q3_K_M.gguf", "118,000,000", "ab" * 32] in rows
    for words in (*(cell for row in rows for cell in row), "KLD ratio 0.371 (0.360–0.383)", report.commands[0]):
        assert words in page.words
    assert "Steepest: token_embd.weight 5, blk.0.attn_q.weight 0.3." in page.words
    assert f"```sh\n{report.commands[0]}\n```" in card


def test_the_front_matter_is_what_the_hub_expects(written: Written) -> None:
    card = written.card.read_text(encoding="utf-8")
    assert card.startswith("---\n")
    data = yaml.safe_load(card.split("---\n")[1])
    assert data == {
        "base_model": "owner/demo",
        "base_model_relation": "quantized",
        "language": ["en"],
        "library_name": "gguf",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "quantized", "imatrix", "llama.cpp", "dynrun"],
    }


def test_every_picture_of_the_card_lies_beside_it(written: Written) -> None:
    shown = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", written.card.read_text(encoding="utf-8"))
    assert [written.folder / name for name in shown] == list(written.plots)
    for path in written.plots:
        assert path.read_bytes().startswith(b"\x89PNG")
        ElementTree.parse(path.with_suffix(".svg"))  # noqa: S314 - our own


def test_words_out_of_files_stay_words(report: Report, tmp_path: Path) -> None:
    evil = hostile(report)
    written = write_report(evil, tmp_path)
    text, card = written.page.read_text(encoding="utf-8"), written.card.read_text(encoding="utf-8")
    page = Elements(text)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "a"}
    assert not [key for _, a in page.tags for key in a if key.startswith("on")]
    for shown in (text, card):
        assert not set(shown) & set("\x1b\u202e\r")
    for name in ("<script>alert(1)</script>", "a|b\\n| c |", "{{ 7*7 }} {% raw %}", "\\x1b[31mred\\u202egnp.exe"):
        assert name in page.words
    rendered = Elements(MarkdownIt("commonmark").enable("table").render(body(card)))
    pictures = [a["src"] for tag, a in rendered.tags if tag == "img"]
    assert pictures == [f"plots/{path.name}" for path in written.plots]
    assert not {tag for tag, _ in rendered.tags} & {"script", "a", "hr"}
    assert "<script>alert(1)</script>" in rendered.words
    assert "a|b\\n| c |" in rendered.words
    assert ["`tick` $\\frac{1}{0}$ ~~~"] * 2 in table_rows(card)
    data = yaml.safe_load(card[4 : card.index("\n---\n")])
    assert data["license"] == "other"
    assert set(data) == {"library_name", "license", "license_name", "pipeline_tag", "tags"}
    assert read_report(tmp_path) == evil


def test_the_same_data_the_same_bytes(written: Written, tmp_path: Path) -> None:
    """In another process with other hashes, out of what was stored."""
    program = (
        "import sys; from pathlib import Path; from dynrun.report.folder import read_report, write_report\n"
        "write_report(read_report(Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    seeded = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", program, written.folder, tmp_path], check=True, env=seeded)
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(names) == 3 + 2 * len(written.plots)
    for name in names:
        assert (tmp_path / name).read_bytes() == (written.folder / name).read_bytes()


def test_a_second_report_leaves_nothing_of_the_first_but_what_is_the_users(report: Report, tmp_path: Path) -> None:
    plots = tmp_path / "plots"
    plots.mkdir()
    stale, mine = plots / "types-7.png", plots / "types-of-mine.png"
    for path in (stale, mine, tmp_path / "model.gguf"):
        path.write_bytes(b"x")
    bare = replace(report, files=report.files[2:], tasks=(), slopes={}, provenance=(), commands=(), versus=())
    written = write_report(bare, tmp_path)
    assert {path.stem for path in written.plots} == {"kld-size", "kld-domains", "kld-percentiles"}
    assert not stale.exists()
    assert mine.exists()
    assert (tmp_path / "model.gguf").exists()
    for heading in ("Questions", "Tensors", "To make"):
        assert heading not in written.card.read_text(encoding="utf-8")


def test_without_slopes_no_alpha_is_explained(report: Report, written: Written, tmp_path: Path) -> None:
    said = "α is the KLD that"
    assert said in written.card.read_text(encoding="utf-8")
    assert said in written.page.read_text(encoding="utf-8")
    without = write_report(replace(report, slopes={}), tmp_path)
    for path in (without.card, without.page):
        text = path.read_text(encoding="utf-8")
        assert "Each cell is a tensor" in text
        assert said not in text


def test_kinds_of_text_fit_on_a_printed_page_however_many_they_are(report: Report) -> None:
    one = report.files[0].domains[0]
    many = tuple(replace(one, name=f"kind {n}") for n in range(40))
    plot = domain_plot(replace(report, files=tuple(replace(file, domains=many) for file in report.files)))
    assert plot is not None
    height, unit = re.search(r'height="([\d.]+)(pt|in)"', plot.svg).groups()  # type: ignore[union-attr]
    assert unit == "pt"
    assert float(height) / 72 < 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "another format"),
        ({"n_tokens": 1.5}, "report.n_tokens must be an integer"),
        ({"model": 3}, "report.model must be a string"),
        ({"files": {}}, "report.files must be a list"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"ppl_reference": None}, "report.ppl_reference must be a number"),
        ({"slopes": {"a": [[1, 2, 3]]}}, "report.slopes.a\\[0\\] must be a list of 2"),
    ],
)
def test_a_file_that_is_no_report_is_refused(
    written: Written, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    data = json.loads((written.folder / "report.json").read_text())
    (data if "format" in change else data["report"]).update(change)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=message):
        read_report(path)
    with pytest.raises(NotFoundError):
        read_report(tmp_path / "nothing")
