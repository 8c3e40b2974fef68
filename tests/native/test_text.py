"""The text of a run: how it is cut and mixed; the test split proves and never steers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from dynrun.allocation.search import SearchSettings
from dynrun.artifacts import stage_folder
from dynrun.calibration import dataset
from dynrun.calibration.conversation import Conversation
from dynrun.calibration.dataset import builtin
from dynrun.calibration.sequences import SHORTEST, Tokenizer, TokenSequence, pack
from dynrun.calibration.splits import split
from dynrun.calibration.stage import ImatrixSettings
from dynrun.calibration.template import template_of
from dynrun.calibration.text import open_text
from dynrun.choose import choose_scheme
from dynrun.config import Config
from dynrun.llamacpp.vocabulary import Vocabulary
from dynrun.models import open_reference
from dynrun.sensitivity.stage import ProbeSettings
from dynrun.stages import Settings, imatrix_stage, read_texts
from dynrun.target import Target
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.native
START = "<|im_start|>"


class Quiet:
    """A front end that shows nothing."""

    def stage(self, name: str, detail: str) -> None:
        """A stage begins."""

    def progress(self, done: float, total: float, note: str = "") -> None:
        """Something was done."""


def pieces(path: Path, conversation: Conversation, n_ctx: int) -> list[str]:
    with Vocabulary.load(path) as vocabulary, template_of(vocabulary.header, "", "", None) as template:
        cut = Tokenizer(vocabulary, template, n_ctx).pieces(conversation)
        assert all(SHORTEST <= len(tokens) <= n_ctx for tokens in cut)
        return [b"".join(map(vocabulary.piece, tokens)).decode() for tokens in cut]


def talk(*lengths: int) -> Conversation:
    messages = [
        {"role": "assistant" if i % 2 else "user", "content": f"{i}" + "abcdefghij" * (n // 10)}
        for i, n in enumerate(lengths)
    ]
    return Conversation("c", "talk", messages)


def records(n: int) -> str:
    """JSON lines of conversations that have no phrase in common."""
    random = np.random.default_rng(3)
    lines = []
    for _ in range(n):
        words = ["".join(chr(97 + c) for c in random.integers(0, 26, 6)) for _ in range(90)]
        said = [" ".join(words[:45]), " ".join(words[45:])]
        lines.append(
            {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), said, strict=True)]}
        )
    return "\n".join(map(json.dumps, lines))


def test_a_long_conversation_is_cut_between_messages(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    cut = pieces(path, talk(100, 100, 100, 100, 100), 300)
    assert len(cut) == 3
    assert all(text.startswith(START) for text in cut)
    assert "".join(cut).count(START) == 5


def test_a_message_that_is_too_long_is_cut_by_length_and_nothing_is_lost(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    what = talk(50, 900, 50)
    cut = pieces(path, what, 200)
    assert "abcdefghij" * 90 in "".join(cut)
    # The long message begins a sequence; it is not the tail of the one before.
    assert [text.startswith(START) for text in cut[:3]] == [True, True, False]


def test_a_conversation_that_fits_is_one_sequence(tmp_path: Path) -> None:
    assert len(pieces(write_tiny_llama(tmp_path / "tiny.gguf"), talk(50, 50), 512)) == 1


def test_batches_hold_whole_sequences_in_order_within_both_limits() -> None:
    lengths = [300, 200, 13, 500, 512, *[1] * 40]
    parts = [TokenSequence(str(i), "x", tuple([i] * n)) for i, n in enumerate(lengths)]
    batches = pack(parts, n_tokens=512, n_seq_max=16)
    assert [tokens for batch in batches for tokens in batch] == [part.tokens for part in parts]
    assert all(sum(map(len, batch)) <= 512 and len(batch) <= 16 for batch in batches)
    assert [len(batch) for batch in batches[:4]] == [2, 1, 1, 16] or [len(b) for b in batches[:4]] == [2, 1, 1, 1]


def test_a_mixture_is_in_proportion_and_begins_with_many_conversations(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    own = tmp_path / "own.jsonl"
    own.write_text(records(200))
    reference = open_reference(str(path))
    with open_text(reference, f"builtin:1,{own}:3", n_tokens=40_000, config=Config()) as text:
        pool = text.calibration(n_tokens=40_000, n_ctx=256)
        assert text.name == "builtin:1,own.jsonl:3"
    assert pool.n_tokens == pytest.approx(40_000, abs=SHORTEST)
    assert pool.tokens_of[str(own)] / pool.tokens_of["builtin"] == pytest.approx(3, rel=0.05)
    assert len({one.id for one in pool.sequences}) == len(pool.sequences)


def test_a_source_that_is_too_small_goes_on_with_the_rest_of_its_conversations(tmp_path: Path) -> None:
    reference = open_reference(str(write_tiny_llama(tmp_path / "tiny.gguf")))
    with open_text(reference, "builtin", n_tokens=10**9, config=Config()) as text:
        few = text.calibration(n_tokens=10_000, n_ctx=128)
        everything = text.calibration(n_tokens=10**9, n_ctx=128)
    assert not few.notes
    assert any("builtin has" in note for note in everything.notes)
    ids = [one.id for one in everything.sequences]
    assert len(ids) > 5 * len(set(ids))


def scheme(reference_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, str], set[str]]:
    """The imatrix's hash, the scheme's types, and the ids of what would be tested on."""
    monkeypatch.setenv("DYNRUN_CACHE", str(cache))
    settings = Settings(
        imatrix=ImatrixSettings(n_tokens=2048, n_ctx=128),
        probes=ProbeSettings(n_tokens=256, n_ctx=64, n_rows=32),
        search=SearchSettings(n_tokens=256, n_ctx=128, n_candidates=3, rounds=1),
        eval_tokens=512,
    )
    reference = open_reference(str(reference_path))
    texts = read_texts(reference, settings, Quiet())
    imatrix = imatrix_stage(reference, texts, settings, Quiet())
    found = choose_scheme(reference, imatrix, texts, Target(bpw=5.5), settings, Quiet(), lambda _: None)
    return imatrix.sha256, dict(found.scheme.types), {part.id for part in texts.test}


def test_another_test_split_gives_the_same_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    tested = {c.id for c in split(builtin().conversations, "test")}
    imatrix, types, ids = scheme(path, tmp_path / "one", monkeypatch)
    assert ids <= tested
    package = tmp_path / "package"
    shutil.copytree(str(files("dynrun.calibration") / "data"), package / "data")
    for file in (package / "data").glob("*.jsonl"):
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
        for record in records:
            if record["id"] in tested:
                record["messages"] = talk(400, 10 * len(record["id"]), 300, 200).messages
        file.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    monkeypatch.setattr(dataset, "files", lambda _: package)
    changed = {c.id for c in split(builtin().conversations, "test") if c.words.startswith("0abcdefghij")}
    assert changed == tested
    assert scheme(path, tmp_path / "two", monkeypatch)[:2] == (imatrix, types)


def test_the_shipped_test_part_is_never_drawn_for_calibration_or_probes(tmp_path: Path) -> None:
    reference = open_reference(str(write_tiny_llama(tmp_path / "tiny.gguf")))
    copied = tmp_path / "copied.jsonl"
    tested = split(builtin().conversations, "test")
    copied.write_text("\n".join(json.dumps({"messages": c.messages}) for c in tested), encoding="utf-8")
    with copied.open("a") as stream:
        stream.write("\n" + records(50))
    with open_text(reference, f"builtin,{copied}", n_tokens=10**6, config=Config()) as text:
        pool = text.calibration(n_tokens=10**6, n_ctx=256)
        probe = text.probe(n_tokens=10**6, n_ctx=256)
        test = text.test(n_tokens=10**6, n_ctx=256)
    assert {one.id for one in test} == {c.id for c in tested}
    used, proof = {one.tokens[:64] for one in [*pool.sequences, *probe]}, {one.tokens[:64] for one in test}
    assert not used & proof
    assert any("too much like held-out ones" in note for note in pool.notes)


def test_stages_are_found_by_what_they_read_and_not_by_how_it_was_named(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.write_text(records(40))
    other.write_bytes(one.read_bytes())
    settings = Settings(calibration=str(one), imatrix=ImatrixSettings(n_tokens=2048, n_ctx=128))
    reference = open_reference(str(path))
    first = imatrix_stage(reference, read_texts(reference, settings, Quiet()), settings, Quiet())
    settings = replace(settings, calibration=str(other))
    again = imatrix_stage(reference, read_texts(reference, settings, Quiet()), settings, Quiet())
    assert again.outcome.cached
    assert (again.path, again.dataset) == (first.path, "one.jsonl")
    assert stage_folder("imatrix", {}).path.parent == first.path.parent.parent
