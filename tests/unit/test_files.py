"""A user's files as a source, whatever is in them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynrun.artifacts import sha256_bytes
from dynrun.calibration.dataset import Source
from dynrun.calibration.files import read_file
from dynrun.errors import DynrunError, NotFoundError


def record(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"Answer to {text}"}]}


RECORDS = [record(f"question {i}") for i in range(40)]


def lines(records: Sequence[object]) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in records).encode()


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def read(path: Path, **limits: int) -> Source:
    return read_file(path, name="mine", **limits)


def questions(source: Source) -> set[str]:
    return {c.messages[0]["content"] for c in source.conversations}


def reason(path: Path) -> str:
    with pytest.raises(DynrunError) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line or "mine" in line
    return line


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", lines(RECORDS)),
        ("a.ndjson", b"\xef\xbb\xbf" + lines(RECORDS).replace(b"\n", b"\r\n\r\n")),
        ("a.jsonl.gz", lines(RECORDS)),
        ("a.json", json.dumps(RECORDS).encode()),
        ("a.json", b"\n " + json.dumps(RECORDS, indent=4).encode()),
        ("lines.json", lines(RECORDS)),
        ("one after the other.json", "\n".join(json.dumps(one, indent=1) for one in RECORDS).encode()),
        ("a.JSON.gz", json.dumps(RECORDS).encode()),
    ],
)
def test_json_in_all_its_forms(tmp_path: Path, name: str, data: bytes) -> None:
    path = written(tmp_path, name, data)
    source = read(path)
    assert questions(source) == {f"question {i}" for i in range(40)}
    assert (source.n_records, source.n_malformed, source.malformed) == (40, 0, ())
    assert source.sha256 == sha256_bytes(path.read_bytes())


def test_json_longer_than_a_chunk_is_read_whole(tmp_path: Path) -> None:
    records = [record(f"{i} " + "x" * 90_000) for i in range(20)] + [record("y" * 700_000)]
    path = written(tmp_path, "a.json", json.dumps(records, indent=1).encode())
    assert questions(read(path)) == {one["messages"][0]["content"] for one in records}


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_parquet_columns_that_nobody_knows_are_not_read(tmp_path: Path, name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    calling = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}
    other = {"role": "assistant", "content": "", "tool_calls": [{"name": "g", "arguments": {"b": 2}}]}
    rows = [{**one, "picture": b"\0"} for one in [*RECORDS, {"messages": [calling]}, {"messages": [other]}]]
    plain = tmp_path / "plain.parquet"
    pq.write_table(pa.Table.from_pylist(rows), plain)
    source = read(written(tmp_path, name, plain.read_bytes()))
    assert {f"question {i}" for i in range(40)} < questions(source)
    arguments = [
        call["function"]["arguments"] for c in source.conversations for call in c.messages[0].get("tool_calls", [])
    ]
    assert sorted(map(str, arguments)) == ["{'a': 1}", "{'b': 2}"]


def test_malformed_records_are_counted_and_named(tmp_path: Path) -> None:
    bad = [b"\n", b'{"messages": [}\n', b'{"text": "\xff"}\n']
    path = written(tmp_path, "a.jsonl", lines(RECORDS[:3]) + b"".join(bad) + lines(RECORDS[3:] * 2))
    source = read(path)
    assert (source.n_records, source.n_malformed) == (79, 2)
    assert source.malformed == ("a.jsonl:5: not JSON", "a.jsonl:6: not UTF-8")
    assert len(source.conversations) == 40


def test_a_malformed_record_of_a_list_is_named_by_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "a.json", json.dumps([*RECORDS, 5], indent=0).encode())
    line = path.read_text().splitlines().index("5") + 1
    assert read(path).malformed == (f"a.json:{line}: a number, not an object",)


def test_a_malformed_row_of_parquet_is_named_by_its_number(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"text {i}" for i in range(600)]
    texts[300] = " "
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").malformed == ("a.parquet:301: empty text",)


def test_more_than_5_percent_malformed_stops(tmp_path: Path) -> None:
    enough = written(tmp_path, "enough.jsonl", lines([*RECORDS[:19], {}]))
    assert read(enough).n_malformed == 1
    line = reason(written(tmp_path, "a.jsonl", lines([*RECORDS[:30], {}, 1, [], "x"])))
    assert "4 of 34 records are malformed" in line
    assert "a.jsonl:31: empty; a.jsonl:32: a number, not an object; a.jsonl:33: a list, not an object" in line
    assert "a.jsonl:34" not in line


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.json", b"", "is empty"),
        ("a.json", b"[]", "is empty"),
        ("a.txt", b"\n \n", "is empty"),
        ("a.txt", b"text \0 more", "it is binary"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
        ("a.json", b'[{"text": "\xff"}]', "is not UTF-8 text"),
        ("a.json", b'[{"text": "a"}, {"text"', "line 1: not JSON"),
        ("a.json", b'[{"text": "a"}\n,\n', "line 3: its list has no end"),
        ("a.json", b"[" * 100_000, "cannot be read"),
        ("a.jsonl", b"[" * 100_000, "not JSON"),
        ("a.parquet", b"PAR1 nothing more", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_line(tmp_path: Path, name: str, data: bytes, expected: str) -> None:
    assert expected in reason(written(tmp_path, name, data))


def test_a_broken_archive_is_said_in_a_line(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(1000).hex().encode()
    path = written(tmp_path, "a.txt.gz", noise)
    path.write_bytes(path.read_bytes()[:-200])
    assert "cannot be read" in reason(path)
    path.write_bytes(b"no archive")
    assert "cannot be read" in reason(path)


def test_parquet_without_text_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"price": [1, 2]}), tmp_path / "a.parquet")
    assert "no column of conversations or text, only price" in reason(tmp_path / "a.parquet")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(NotFoundError, match="is a folder"):
        read(tmp_path)


def paragraphs(n: int, start: int = 0) -> str:
    return "\n\n".join(f"Paragraph {i}. " + "Some words of it follow. " * 20 for i in range(start, start + n)) + "\n\n"


def test_plain_text_is_cut_between_paragraphs(tmp_path: Path) -> None:
    text = paragraphs(400)
    source = read(written(tmp_path, "a.txt", text.encode()))
    sizes = [len(c.text) for c in source.conversations]
    assert sorted(sizes)[len(sizes) // 2] == pytest.approx(4000, rel=0.2)
    assert max(sizes) <= 5000
    assert all(c.text.startswith("Paragraph") for c in source.conversations)
    assert sum(c.text.count("Paragraph") for c in source.conversations) == 400
    per_document = [
        sum(c.document == d for c in source.conversations) for d in {c.document for c in source.conversations}
    ]
    assert max(per_document) == 10


def test_text_without_paragraphs_or_lines_is_cut_too(tmp_path: Path) -> None:
    words = " ".join(f"word{i}" for i in range(20_000))
    source = read(written(tmp_path, "a.md", words.encode()))
    assert max(len(c.text) for c in source.conversations) <= 5000
    found = re.findall(r"\S+", " ".join(c.text for c in source.conversations))
    assert sorted(found) == sorted(words.split())
    unbroken = read(written(tmp_path, "b", "汉".encode() * 30_000))
    assert sum(len(c.text) for c in unbroken.conversations) <= 30_000
    assert max(len(c.text) for c in unbroken.conversations) <= 5000


@pytest.mark.parametrize("title", [" = Article {} = \n\n", '<doc id="{}" title="x">\n'])
def test_an_article_is_a_document(tmp_path: Path, title: str) -> None:
    articles = [title.format(i) + " = = Section = = \n" + paragraphs(12, 100 * i) for i in range(5)]
    source = read(written(tmp_path, "wiki.raw", "".join(articles).encode()))
    documents: dict[str, set[str]] = {}
    for c in source.conversations:
        documents.setdefault(c.document, set()).update(re.findall(r"Paragraph (\d*)\d\d\.", c.text))
    assert len(documents) == 5
    assert all(len(numbers) == 1 for numbers in documents.values())


def test_a_long_text_of_a_record_is_cut_into_passages_of_one_document(tmp_path: Path) -> None:
    source = read(written(tmp_path, "a.jsonl", lines([{"text": paragraphs(100)}, {"text": "short"}])))
    assert source.n_records == 2
    assert len({c.document for c in source.conversations if c.text != "short"}) == 1
    assert max(len(c.text) for c in source.conversations) <= 5000
    assert len(source.conversations) > 10


def test_neither_order_nor_copies_matter(tmp_path: Path) -> None:
    shuffled = RECORDS * 2
    np.random.default_rng(1).shuffle(shuffled)  # type: ignore[arg-type]
    one = read(written(tmp_path, "a.jsonl", lines(RECORDS)))
    other = read(written(tmp_path, "b.jsonl", lines(shuffled)))
    assert one.conversations == other.conversations
    assert [c.messages for c in one.conversations] != [r["messages"] for r in RECORDS]


def test_a_limit_keeps_the_same_sample_in_any_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    records = [{"text": f"{i} " + "x" * int(rng.choice([10, 100, 2000]))} for i in range(300)]
    kept = []
    for _ in range(3):
        rng.shuffle(records)
        kept.append(read(written(tmp_path, "a.jsonl", lines(records)), limit_chars=20_000).conversations)
    assert kept[0] == kept[1] == kept[2]
    assert 15_000 < sum(len(c.text) for c in kept[0]) <= 20_000
    whole = read(tmp_path / "a.jsonl").conversations
    assert kept[0] == whole[: len(kept[0])]
